import type { Attack } from '../attack.js'
import { checkpoint } from '../forge.js'

export default {
  trick: 'The map of characters claims a table of four gigabytes and holds none.',
  make: (folder) => {
    checkpoint(folder, ({ tokenizer }) => {
      tokenizer.normalizer = {
        type: 'Precompiled',
        precompiled_charsmap: Buffer.from([0xfc, 0xff, 0xff, 0xff]).toString('base64'),
      }
    })
  },
  doors: ['load', 'compress'],
  code: 'ERR_TOKENIZER_INVALID',
  subject: /tokenizer\.json$/,
} satisfies Attack
