import { CHECKPOINT, type Attack } from '../attack.js'
import { gguf, u32, u64 } from '../forge.js'

export default {
  trick: 'The length of a text is the largest number, to which nothing can be added.',
  make: (folder) => {
    gguf(folder, (file) => {
      file.values['general.name'] = Buffer.concat([u32(8), u64(2n ** 64n - 1n)])
    })
  },
  doors: CHECKPOINT,
  code: 'ERR_CHECKPOINT_CORRUPT',
  subject: /model\.gguf$/,
} satisfies Attack
