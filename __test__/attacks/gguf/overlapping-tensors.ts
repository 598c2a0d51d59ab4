import { CHECKPOINT, type Attack } from '../attack.js'
import { gguf } from '../forge.js'

export default {
  trick: 'Two tensors share bytes.',
  make: (folder) => {
    gguf(folder, (file) => {
      file.tensors[1]!.offset = 0
    })
  },
  doors: CHECKPOINT,
  code: 'ERR_CHECKPOINT_CORRUPT',
  subject: /model\.gguf$/,
} satisfies Attack
