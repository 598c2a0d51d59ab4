import { CHECKPOINT, type Attack } from '../attack.js'
import { checkpoint } from '../forge.js'

export default {
  trick: 'Codes have 99 bits.',
  make: (folder) => {
    checkpoint(folder, ({ config }) => {
      config['quantization_config'] = {
        quant_method: 'compressed-tensors',
        format: 'pack-quantized',
        config_groups: {
          group_0: { targets: ['Linear'], weights: { group_size: 32, strategy: 'group', num_bits: 99 } },
        },
      }
    })
  },
  doors: CHECKPOINT,
  code: 'ERR_QUANTIZATION_UNSUPPORTED',
  subject: /num_bits$/,
} satisfies Attack
