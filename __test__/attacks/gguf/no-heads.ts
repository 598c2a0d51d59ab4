import { CHECKPOINT, type Attack } from '../attack.js'
import { gguf, ggufNumber } from '../forge.js'

export default {
  trick: 'There are no heads, which sizes are divided by.',
  make: (folder) => {
    gguf(folder, (file) => {
      file.values['llama.attention.head_count'] = ggufNumber(0)
    })
  },
  doors: CHECKPOINT,
  code: 'ERR_CONFIG_INVALID',
  subject: /head_count/,
} satisfies Attack
