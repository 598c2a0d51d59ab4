import type { Attack } from '../attack.js'
import { checkpoint } from '../forge.js'

export default {
  trick: 'The parameters of rotary embedding lead to no finite angles.',
  make: (folder) => {
    checkpoint(folder, ({ config }) =>
      Object.assign(config, { rope_parameters: { rope_type: 'linear', rope_theta: 1e-308, factor: 1e-308 } }),
    )
  },
  doors: ['load', 'compress'],
  code: 'ERR_CONFIG_INVALID',
  subject: /^rope_parameters$/,
} satisfies Attack
