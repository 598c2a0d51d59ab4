import { CHECKPOINT, type Attack } from '../attack.js'
import { gguf } from '../forge.js'

export default {
  trick: 'The offset of a tensor is the largest that is aligned.',
  make: (folder) => {
    gguf(folder, (file) => {
      file.tensors[1]!.offset = 2n ** 64n - 32n
    })
  },
  doors: CHECKPOINT,
  code: 'ERR_CHECKPOINT_CORRUPT',
  subject: /model\.gguf$/,
} satisfies Attack
