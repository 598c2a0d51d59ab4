import { CHECKPOINT, type Attack } from '../attack.js'
import { gguf, ggufArray, u32, u64 } from '../forge.js'

export default {
  trick: 'An array holds as many empty arrays as a file of this size can name, nested.',
  make: (folder) => {
    gguf(folder, (file) => {
      const level = Buffer.concat([u32(9), u64(1)])
      file.values['general.tags'] = ggufArray(9, 1, Buffer.concat(Array<Buffer>(100_000).fill(level)))
    })
  },
  doors: CHECKPOINT,
  code: 'ERR_CHECKPOINT_CORRUPT',
  subject: /model\.gguf$/,
} satisfies Attack
