import type { Attack } from '../attack.js'
import { checkpoint } from '../forge.js'

export default {
  trick: 'There are no heads, which sizes are divided by.',
  make: (folder) => {
    checkpoint(folder, ({ config }) => Object.assign(config, { num_attention_heads: 0 }))
  },
  doors: ['load', 'compress'],
  code: 'ERR_CONFIG_INVALID',
  subject: /^num_attention_heads$/,
} satisfies Attack
