import type { Attack } from '../attack.js'
import { checkpoint } from '../forge.js'

const EVERYWHERE = { type: 'Replace', pattern: { Regex: '' }, content: 'ttttttttt' }

export default {
  trick: 'An expression that matches nothing is replaced everywhere, again and again.',
  make: (folder) => {
    checkpoint(folder, ({ tokenizer }) => {
      tokenizer.normalizer = { type: 'Sequence', normalizers: Array(12).fill(EVERYWHERE) }
    })
  },
  doors: ['load', 'compress'],
  code: 'ERR_TOKENIZER_INVALID',
  subject: /tokenizer\.json$/,
} satisfies Attack
