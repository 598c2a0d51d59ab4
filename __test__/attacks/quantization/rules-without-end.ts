import { CHECKPOINT, type Attack } from '../attack.js'
import { checkpoint } from '../forge.js'

const RULES = Object.fromEntries(Array.from({ length: 100_000 }, (_, i) => [`+:.*\\w+\\.${i}`, { bits: 8 }]))

export default {
  trick: 'GPTQ: there are a hundred thousand rules, each a compiled program.',
  make: (folder) => {
    checkpoint(folder, ({ config }) => {
      config['quantization_config'] = { quant_method: 'gptq', bits: 4, group_size: 32, dynamic: RULES }
    })
  },
  doors: CHECKPOINT,
  code: 'ERR_CONFIG_INVALID',
  subject: /^dynamic$/,
} satisfies Attack
