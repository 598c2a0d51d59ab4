import { CHECKPOINT, type Attack } from '../attack.js'
import { checkpoint } from '../forge.js'

export default {
  trick: 'The method does not exist.',
  make: (folder) => {
    checkpoint(folder, ({ config }) => {
      config['quantization_config'] = { quant_method: 'alchemy', bits: 4 }
    })
  },
  doors: CHECKPOINT,
  code: 'ERR_QUANTIZATION_UNSUPPORTED',
  subject: /^quant_method$/,
} satisfies Attack
