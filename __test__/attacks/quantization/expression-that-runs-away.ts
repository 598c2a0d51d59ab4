import type { Attack } from '../attack.js'
import { checkpoint } from '../forge.js'

export default {
  trick: 'An expression takes exponential time for every name. It matches nothing within its steps.',
  make: (folder) => {
    checkpoint(folder, ({ config }) => {
      config['quantization_config'] = {
        quant_method: 'compressed-tensors',
        format: 'pack-quantized',
        config_groups: {
          group_0: {
            targets: ['Linear', 're:(?=(((\\w|\\.)+)+)+$)\\1!'],
            weights: { num_bits: 4, group_size: 32, strategy: 'group' },
          },
        },
      }
    })
  },
  doors: ['open'],
  code: null,
} satisfies Attack
