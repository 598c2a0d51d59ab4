import type { Attack } from '../attack.js'
import { checkpoint } from '../forge.js'

export default {
  trick: 'The model claims to have sixteen million layers.',
  make: (folder) => {
    checkpoint(folder, ({ config }) => Object.assign(config, { num_hidden_layers: 2 ** 24 }))
  },
  doors: ['load', 'compress'],
  code: 'ERR_CONFIG_INVALID',
  subject: /^num_hidden_layers$/,
} satisfies Attack
