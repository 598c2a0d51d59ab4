import { CHECKPOINT, type Attack } from '../attack.js'
import { checkpoint } from '../forge.js'

export default {
  trick: 'Groups have no column.',
  make: (folder) => {
    checkpoint(folder, ({ config }) => {
      config['quantization_config'] = {
        quant_method: 'compressed-tensors',
        format: 'pack-quantized',
        config_groups: { group_0: { targets: ['Linear'], weights: { num_bits: 4, strategy: 'group', group_size: 0 } } },
      }
    })
  },
  doors: CHECKPOINT,
  code: 'ERR_CONFIG_INVALID',
  subject: /group_size$/,
} satisfies Attack
