import type { Attack } from '../attack.js'
import { checkpoint } from '../forge.js'

export default {
  trick: 'Four heads share three key heads.',
  make: (folder) => {
    checkpoint(folder, ({ config }) => Object.assign(config, { num_key_value_heads: 3 }))
  },
  doors: ['load', 'compress'],
  code: 'ERR_CONFIG_INVALID',
  subject: /^num_key_value_heads$/,
} satisfies Attack
