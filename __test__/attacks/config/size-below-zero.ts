import type { Attack } from '../attack.js'
import { checkpoint } from '../forge.js'

export default {
  trick: 'The hidden size is negative.',
  make: (folder) => {
    checkpoint(folder, ({ config }) => Object.assign(config, { hidden_size: -32 }))
  },
  doors: ['load', 'compress'],
  code: 'ERR_CONFIG_INVALID',
  subject: /^hidden_size$/,
} satisfies Attack
