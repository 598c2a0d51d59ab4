import type { Attack } from '../attack.js'
import { checkpoint } from '../forge.js'

export default {
  trick: 'The prefix that a merge takes off its second half ends inside of a character.',
  make: (folder) => {
    checkpoint(folder, ({ tokenizer }) => {
      tokenizer.model = {
        type: 'BPE',
        vocab: { a: 0, é: 1, aé: 2 },
        merges: [['a', 'é']],
        continuing_subword_prefix: '#',
      }
    })
  },
  doors: ['load', 'compress'],
  code: 'ERR_TOKENIZER_INVALID',
  subject: /tokenizer\.json$/,
} satisfies Attack
