import { CHECKPOINT, type Attack } from '../attack.js'
import { gguf } from '../forge.js'

export default {
  trick: 'The product of the sizes does not fit into a number.',
  make: (folder) => {
    gguf(folder, (file) => {
      file.tensors[0]!.shape = [2n ** 33n, 2n ** 33n]
    })
  },
  doors: CHECKPOINT,
  code: 'ERR_CHECKPOINT_CORRUPT',
  subject: /model\.gguf$/,
} satisfies Attack
