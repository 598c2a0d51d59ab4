import { CHECKPOINT, type Attack } from '../attack.js'
import { gguf, ggufNumber } from '../forge.js'

export default {
  trick: 'Tensors are aligned to no power of two.',
  make: (folder) => {
    gguf(folder, (file) => {
      file.values['general.alignment'] = ggufNumber(3)
    })
  },
  doors: CHECKPOINT,
  code: 'ERR_CHECKPOINT_CORRUPT',
  subject: /model\.gguf$/,
} satisfies Attack
