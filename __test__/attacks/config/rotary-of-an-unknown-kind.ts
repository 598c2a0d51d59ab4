import type { Attack } from '../attack.js'
import { checkpoint } from '../forge.js'

export default {
  trick: 'The kind of rotary scaling does not exist.',
  make: (folder) => {
    checkpoint(folder, ({ config }) => Object.assign(config, { rope_parameters: { rope_type: 'quantum' } }))
  },
  doors: ['load', 'compress'],
  code: 'ERR_CONFIG_UNSUPPORTED',
  subject: /^rope_type$/,
} satisfies Attack
