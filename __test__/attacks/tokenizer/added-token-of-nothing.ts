import type { Attack } from '../attack.js'
import { checkpoint } from '../forge.js'

export default {
  trick: 'An added token has no text, so it is everywhere.',
  make: (folder) => {
    checkpoint(folder, ({ tokenizer }) => {
      tokenizer.added_tokens = [
        { id: 3, content: '', single_word: false, lstrip: false, rstrip: false, normalized: false, special: true },
      ]
    })
  },
  doors: ['load'],
  code: null,
} satisfies Attack
