import { CHECKPOINT, type Attack } from '../attack.js'
import { gguf } from '../forge.js'

export default {
  trick: 'The type of a tensor does not exist.',
  make: (folder) => {
    gguf(folder, (file) => {
      file.tensors[1]!.type = 250
    })
  },
  doors: CHECKPOINT,
  code: 'ERR_QUANTIZATION_UNSUPPORTED',
  subject: /blk\.0\.attn_q\.weight/,
} satisfies Attack
