import type { Attack } from '../attack.js'
import { checkpoint } from '../forge.js'

export default {
  trick: 'The model claims to have a thousand layers.',
  make: (folder) => {
    checkpoint(folder, ({ config }) => Object.assign(config, { num_hidden_layers: 1000 }))
  },
  doors: ['load', 'compress'],
  code: 'ERR_CHECKPOINT_TENSOR_MISSING',
  subject: /layers\.2\./,
} satisfies Attack
