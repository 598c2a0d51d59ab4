import type { Attack } from '../attack.js'
import { checkpoint } from '../forge.js'

export default {
  trick: 'It is JSON, but no tokenizer.',
  make: (folder) => {
    checkpoint(folder, ({ tokenizer }) => {
      delete tokenizer.model
    })
  },
  doors: ['load', 'compress'],
  code: 'ERR_TOKENIZER_INVALID',
  subject: /tokenizer\.json$/,
} satisfies Attack
