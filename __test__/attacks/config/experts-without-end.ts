import type { Attack } from '../attack.js'
import { checkpoint } from '../forge.js'

export default {
  trick: 'There are a million experts.',
  make: (folder) => {
    checkpoint(folder, ({ config }) =>
      Object.assign(config, {
        architectures: ['MixtralForCausalLM'],
        num_local_experts: 2 ** 20,
        num_experts_per_tok: 2,
      }),
    )
  },
  doors: ['load', 'compress'],
  code: 'ERR_CONFIG_INVALID',
  subject: /^num_local_experts$/,
} satisfies Attack
