import type { Attack } from '../attack.js'
import { checkpoint } from '../forge.js'

export default {
  trick: 'LongRoPE has a factor for each pair; here is one in all.',
  make: (folder) => {
    checkpoint(folder, ({ config }) =>
      Object.assign(config, { rope_parameters: { rope_type: 'longrope', short_factor: [1], long_factor: [1] } }),
    )
  },
  doors: ['load', 'compress'],
  code: 'ERR_CONFIG_INVALID',
  subject: /^(short|long)_factor$/,
} satisfies Attack
