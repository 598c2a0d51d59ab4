import type { Attack } from '../attack.js'
import { checkpoint } from '../forge.js'

export default {
  trick:
    'The expression that cuts texts takes exponential time. It is given up after its steps, and the text stays whole.',
  make: (folder) => {
    checkpoint(folder, ({ tokenizer }) => {
      tokenizer.pre_tokenizer = {
        type: 'Split',
        pattern: { Regex: '((?=a)a|aa)+!' },
        behavior: 'Isolated',
        invert: false,
      }
    })
  },
  doors: ['load'],
  code: null,
  prompt: 'a'.repeat(2000),
} satisfies Attack
