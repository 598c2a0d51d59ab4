import type { Attack } from '../attack.js'
import { checkpoint } from '../forge.js'

export default {
  trick: 'A token has the largest number; the embedding has 64 rows.',
  make: (folder) => {
    checkpoint(folder, ({ tokenizer }) => {
      tokenizer.model.vocab.t1 = 2 ** 32 - 1
    })
  },
  doors: ['load', 'compress'],
  code: 'ERR_TOKENIZER_INVALID',
  subject: /tokenizer\.json$/,
} satisfies Attack
