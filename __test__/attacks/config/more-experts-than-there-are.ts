import type { Attack } from '../attack.js'
import { checkpoint } from '../forge.js'

export default {
  trick: 'Each token goes to more experts than there are.',
  make: (folder) => {
    checkpoint(folder, ({ config }) =>
      Object.assign(config, { architectures: ['MixtralForCausalLM'], num_local_experts: 2, num_experts_per_tok: 3 }),
    )
  },
  doors: ['load', 'compress'],
  code: 'ERR_CONFIG_INVALID',
  subject: /^num_experts_per_tok$/,
} satisfies Attack
