import type { Attack } from '../attack.js'
import { checkpoint } from '../forge.js'

export default {
  trick: 'Texts are cut into pieces of no length.',
  make: (folder) => {
    checkpoint(folder, ({ tokenizer }) => {
      tokenizer.pre_tokenizer = { type: 'FixedLength', length: 0 }
    })
  },
  doors: ['load'],
  code: 'ERR_TOKENIZER_INVALID',
  subject: /tokenizer\.json$/,
} satisfies Attack
