import type { Attack } from '../attack.js'
import { gguf, ggufFloats } from '../forge.js'

export default {
  trick: 'The vocabulary has four tokens and one score.',
  make: (folder) => {
    gguf(folder, (file) => {
      file.values['tokenizer.ggml.scores'] = ggufFloats([0])
    })
  },
  doors: ['load'],
  code: 'ERR_TOKENIZER_INVALID',
  subject: /tokenizer\.ggml/,
} satisfies Attack
