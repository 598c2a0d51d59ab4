import { ADAPTER, type Attack } from '../attack.js'
import { LORA_A, adapter } from '../forge.js'

export default {
  trick: 'A has another rank than B.',
  make: (folder) => {
    adapter(folder, ({ shapes }) => {
      shapes[LORA_A] = [3, 32]
    })
  },
  doors: ADAPTER,
  code: 'ERR_ADAPTER_INVALID',
  subject: /q_proj/,
} satisfies Attack
