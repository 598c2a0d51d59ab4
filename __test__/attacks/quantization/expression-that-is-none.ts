import { CHECKPOINT, type Attack } from '../attack.js'
import { checkpoint } from '../forge.js'

export default {
  trick: 'A target is no expression.',
  make: (folder) => {
    checkpoint(folder, ({ config }) => {
      config['quantization_config'] = {
        quant_method: 'compressed-tensors',
        format: 'pack-quantized',
        config_groups: { group_0: { targets: ['re:('], weights: { num_bits: 4, group_size: 32, strategy: 'group' } } },
      }
    })
  },
  doors: CHECKPOINT,
  code: 'ERR_CONFIG_INVALID',
  subject: /^\($/,
} satisfies Attack
