import type { Attack } from '../attack.js'
import { checkpoint } from '../forge.js'

const TENFOLD = { type: 'Replace', pattern: { String: 't' }, content: 't'.repeat(10) }

export default {
  trick: 'Twelve replacements in the decoder: the bomb is what the model says.',
  make: (folder) => {
    checkpoint(folder, ({ tokenizer }) => {
      tokenizer.decoder = { type: 'Sequence', decoders: Array(12).fill(TENFOLD) }
    })
  },
  doors: ['load', 'compress'],
  code: 'ERR_TOKENIZER_INVALID',
  subject: /tokenizer\.json$/,
} satisfies Attack
