import { CHECKPOINT, type Attack } from '../attack.js'
import { checkpoint } from '../forge.js'

const TARGETS = Array.from({ length: 100_000 }, (_, i) => `re:.*\\w+\\.${i}`)

export default {
  trick: 'There are a hundred thousand expressions, each a compiled program.',
  make: (folder) => {
    checkpoint(folder, ({ config }) => {
      config['quantization_config'] = {
        quant_method: 'compressed-tensors',
        format: 'pack-quantized',
        config_groups: { group_0: { targets: TARGETS, weights: { num_bits: 4, group_size: 32, strategy: 'group' } } },
      }
    })
  },
  doors: CHECKPOINT,
  code: 'ERR_CONFIG_INVALID',
  subject: /^config_groups$/,
} satisfies Attack
