import { CHECKPOINT, type Attack } from '../attack.js'
import { gguf } from '../forge.js'

export default {
  trick: 'Two tensors have one name.',
  make: (folder) => {
    gguf(folder, (file) => {
      file.tensors[1]!.name = file.tensors[2]!.name
    })
  },
  doors: CHECKPOINT,
  code: 'ERR_CHECKPOINT_CORRUPT',
  subject: /model\.gguf$/,
} satisfies Attack
