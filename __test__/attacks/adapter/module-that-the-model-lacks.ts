import type { Attack } from '../attack.js'
import { LORA_A, LORA_B, adapter } from '../forge.js'

export default {
  trick: 'The module does not exist in the model.',
  make: (folder) => {
    adapter(folder, ({ shapes }) => {
      delete shapes[LORA_A]
      delete shapes[LORA_B]
      shapes['base_model.model.ghost.lora_A.weight'] = [2, 32]
      shapes['base_model.model.ghost.lora_B.weight'] = [32, 2]
    })
  },
  doors: ['adapter', 'fold'],
  code: 'ERR_ADAPTER_INVALID',
  subject: /ghost/,
} satisfies Attack
