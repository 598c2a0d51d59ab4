import { CHECKPOINT, type Attack } from '../attack.js'
import { gguf, ggufNumber } from '../forge.js'

export default {
  trick: 'Tensors are aligned to two gigabytes.',
  make: (folder) => {
    gguf(folder, (file) => {
      file.values['general.alignment'] = ggufNumber(2 ** 31)
    })
  },
  doors: CHECKPOINT,
  code: 'ERR_CHECKPOINT_CORRUPT',
  subject: /model\.gguf$/,
} satisfies Attack
