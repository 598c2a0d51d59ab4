import type { Attack } from '../attack.js'
import { gguf, ggufNumber } from '../forge.js'

export default {
  trick: 'There are four billion layers.',
  make: (folder) => {
    gguf(folder, (file) => {
      file.values['llama.block_count'] = ggufNumber(2 ** 32 - 1)
    })
  },
  doors: ['load', 'compress'],
  code: 'ERR_CONFIG_INVALID',
  subject: /block_count|num_hidden_layers/,
} satisfies Attack
