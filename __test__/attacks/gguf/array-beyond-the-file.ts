import { CHECKPOINT, type Attack } from '../attack.js'
import { gguf, ggufArray } from '../forge.js'

export default {
  trick: 'An array has more elements than the file has bytes.',
  make: (folder) => {
    gguf(folder, (file) => {
      file.values['general.tags'] = ggufArray(4, 2n ** 61n, Buffer.alloc(64))
    })
  },
  doors: CHECKPOINT,
  code: 'ERR_CHECKPOINT_CORRUPT',
  subject: /model\.gguf$/,
} satisfies Attack
