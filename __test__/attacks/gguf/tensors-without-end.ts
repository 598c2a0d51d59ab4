import { CHECKPOINT, type Attack } from '../attack.js'
import { gguf } from '../forge.js'

export default {
  trick: 'There are 2^63 tensors.',
  make: (folder) => {
    gguf(folder, (file) => {
      file.tensorCount = 2n ** 63n
    })
  },
  doors: CHECKPOINT,
  code: 'ERR_CHECKPOINT_CORRUPT',
  subject: /model\.gguf$/,
} satisfies Attack
