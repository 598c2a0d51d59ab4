import { CHECKPOINT, type Attack } from '../attack.js'
import { gguf } from '../forge.js'

export default {
  trick: 'A tensor has five hundred dimensions.',
  make: (folder) => {
    gguf(folder, (file) => {
      file.tensors[0]!.shape = Array(500).fill(1)
    })
  },
  doors: CHECKPOINT,
  code: 'ERR_CHECKPOINT_CORRUPT',
  subject: /model\.gguf$/,
} satisfies Attack
