import type { Attack } from '../attack.js'
import { checkpoint } from '../forge.js'

export default {
  trick: 'The vocabulary is empty.',
  make: (folder) => {
    checkpoint(folder, ({ tokenizer }) => {
      tokenizer.model.vocab = {}
    })
  },
  doors: ['load', 'compress'],
  code: 'ERR_TOKENIZER_INVALID',
  subject: /tokenizer\.json$/,
} satisfies Attack
