import { CHECKPOINT, type Attack } from '../attack.js'
import { checkpoint } from '../forge.js'

export default {
  trick: 'GPTQ: a rule is a short expression that stands for gigabytes.',
  make: (folder) => {
    checkpoint(folder, ({ config }) => {
      config['quantization_config'] = {
        quant_method: 'gptq',
        bits: 4,
        group_size: 32,
        dynamic: { '+:(((\\w{100}){100}){100}){100}': { bits: 8 } },
      }
    })
  },
  doors: CHECKPOINT,
  code: 'ERR_CONFIG_INVALID',
  subject: /w\{100\}/,
} satisfies Attack
