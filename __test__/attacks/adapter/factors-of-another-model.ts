import type { Attack } from '../attack.js'
import { LORA_A, adapter } from '../forge.js'

export default {
  trick: 'The factors are wider than the Linear.',
  make: (folder) => {
    adapter(folder, ({ shapes }) => {
      shapes[LORA_A] = [2, 64]
    })
  },
  doors: ['adapter', 'fold'],
  code: 'ERR_ADAPTER_INVALID',
  subject: /q_proj/,
} satisfies Attack
