import type { Attack } from '../attack.js'
import { checkpoint } from '../forge.js'

export default {
  trick: 'A short expression stands for a state machine of gigabytes.',
  make: (folder) => {
    checkpoint(folder, ({ tokenizer }) => {
      tokenizer.pre_tokenizer = {
        type: 'Split',
        pattern: { Regex: '(((\\w{100}){100}){100}){100}' },
        behavior: 'Isolated',
        invert: false,
      }
    })
  },
  doors: ['load', 'compress'],
  code: 'ERR_TOKENIZER_INVALID',
  subject: /tokenizer\.json$/,
} satisfies Attack
