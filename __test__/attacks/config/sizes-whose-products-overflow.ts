import type { Attack } from '../attack.js'
import { checkpoint } from '../forge.js'

export default {
  trick: 'Each size is possible, their products are not.',
  make: (folder) => {
    checkpoint(folder, ({ config }) =>
      Object.assign(config, { num_attention_heads: 2 ** 24, num_key_value_heads: 2 ** 24, head_dim: 2 ** 24 }),
    )
  },
  doors: ['load', 'compress'],
  code: 'ERR_CONFIG_INVALID',
  subject: /heads/,
} satisfies Attack
