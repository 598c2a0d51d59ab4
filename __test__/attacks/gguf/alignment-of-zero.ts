import { CHECKPOINT, type Attack } from '../attack.js'
import { gguf, ggufNumber } from '../forge.js'

export default {
  trick: 'Tensors are aligned to multiples of nothing.',
  make: (folder) => {
    gguf(folder, (file) => {
      file.values['general.alignment'] = ggufNumber(0)
    })
  },
  doors: CHECKPOINT,
  code: 'ERR_CHECKPOINT_CORRUPT',
  subject: /model\.gguf$/,
} satisfies Attack
