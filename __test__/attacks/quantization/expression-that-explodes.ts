import { CHECKPOINT, type Attack } from '../attack.js'
import { checkpoint } from '../forge.js'

export default {
  trick: 'A short expression stands for a state machine of gigabytes.',
  make: (folder) => {
    checkpoint(folder, ({ config }) => {
      config['quantization_config'] = {
        quant_method: 'compressed-tensors',
        format: 'pack-quantized',
        config_groups: {
          group_0: {
            targets: ['re:(((\\w{100}){100}){100}){100}'],
            weights: { num_bits: 4, group_size: 32, strategy: 'group' },
          },
        },
      }
    })
  },
  doors: CHECKPOINT,
  code: 'ERR_CONFIG_INVALID',
  subject: /w\{100\}/,
} satisfies Attack
