import type { Attack } from '../attack.js'
import { checkpoint } from '../forge.js'

export default {
  trick: 'The map of characters leads out of its table.',
  make: (folder) => {
    checkpoint(folder, ({ tokenizer }) => {
      tokenizer.normalizer = {
        type: 'Precompiled',
        precompiled_charsmap: Buffer.from([4, 0, 0, 0, 0, 0xff, 0xff, 0x7f]).toString('base64'),
      }
    })
  },
  doors: ['load', 'compress'],
  code: 'ERR_TOKENIZER_INVALID',
  subject: /tokenizer\.json$/,
} satisfies Attack
