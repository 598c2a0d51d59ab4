import { CHECKPOINT, type Attack } from '../attack.js'
import { gguf, ggufNumber } from '../forge.js'

export default {
  trick: 'The file says that it is one of a thousand.',
  make: (folder) => {
    gguf(folder, (file) => {
      file.values['split.count'] = ggufNumber(1000)
    })
  },
  doors: CHECKPOINT,
  code: 'ERR_CHECKPOINT_SHARD_MISSING',
  subject: /model\.gguf$/,
} satisfies Attack
