import { CHECKPOINT, type Attack } from '../attack.js'
import { gguf, u32, u64 } from '../forge.js'

export default {
  trick: 'A text is longer than the file.',
  make: (folder) => {
    gguf(folder, (file) => {
      file.values['general.name'] = Buffer.concat([u32(8), u64(2n ** 40n)])
    })
  },
  doors: CHECKPOINT,
  code: 'ERR_CHECKPOINT_CORRUPT',
  subject: /model\.gguf$/,
} satisfies Attack
