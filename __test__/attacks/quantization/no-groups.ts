import { CHECKPOINT, type Attack } from '../attack.js'
import { checkpoint } from '../forge.js'

export default {
  trick: 'Nothing says how Linears are quantized.',
  make: (folder) => {
    checkpoint(folder, ({ config }) => {
      config['quantization_config'] = {
        quant_method: 'compressed-tensors',
        format: 'pack-quantized',
        config_groups: {},
      }
    })
  },
  doors: CHECKPOINT,
  code: 'ERR_CONFIG_INVALID',
  subject: /^config_groups$/,
} satisfies Attack
