import { CHECKPOINT, type Attack } from '../attack.js'
import { checkpoint } from '../forge.js'

export default {
  trick: 'The context is as long as it can be: nothing may be reserved for it.',
  make: (folder) => {
    checkpoint(folder, ({ config }) => Object.assign(config, { max_position_embeddings: 2 ** 24 }))
  },
  doors: CHECKPOINT,
  code: null,
} satisfies Attack
