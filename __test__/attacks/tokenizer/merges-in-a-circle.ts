import type { Attack } from '../attack.js'
import { checkpoint } from '../forge.js'

export default {
  trick: 'Merges lead from tokens to themselves.',
  make: (folder) => {
    checkpoint(folder, ({ tokenizer }) => {
      tokenizer.model = { type: 'BPE', vocab: { a: 0, b: 1, ab: 2, ba: 3 }, merges: ['a b', 'ab a', 'b a', 'ba b'] }
    })
  },
  doors: ['load', 'compress'],
  code: 'ERR_TOKENIZER_INVALID',
  subject: /tokenizer\.json$/,
} satisfies Attack
