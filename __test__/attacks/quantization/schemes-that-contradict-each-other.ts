import { CHECKPOINT, type Attack } from '../attack.js'
import { checkpoint } from '../forge.js'

export default {
  trick: 'All Linears have four bits, and all have eight.',
  make: (folder) => {
    checkpoint(folder, ({ config }) => {
      config['quantization_config'] = {
        quant_method: 'compressed-tensors',
        format: 'pack-quantized',
        config_groups: {
          group_0: { targets: ['Linear'], weights: { num_bits: 4, group_size: 32, strategy: 'group' } },
          group_1: { targets: ['Linear'], weights: { num_bits: 8, strategy: 'channel' } },
        },
      }
    })
  },
  doors: CHECKPOINT,
  code: 'ERR_QUANTIZATION_UNSUPPORTED',
  subject: /^config_groups$/,
} satisfies Attack
