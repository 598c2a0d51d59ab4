import type { Attack } from '../attack.js'
import { checkpoint } from '../forge.js'

const TENFOLD = { type: 'Replace', pattern: { String: 't' }, content: 't'.repeat(10) }

export default {
  trick: 'Twelve replacements, each of a letter by ten, make a thousand gigabytes of one letter.',
  make: (folder) => {
    checkpoint(folder, ({ tokenizer }) => {
      tokenizer.normalizer = { type: 'Sequence', normalizers: Array(12).fill(TENFOLD) }
    })
  },
  doors: ['load', 'compress'],
  code: 'ERR_TOKENIZER_INVALID',
  subject: /tokenizer\.json$/,
} satisfies Attack
