import { ADAPTER, type Attack } from '../attack.js'
import { LORA_B, adapter } from '../forge.js'

export default {
  trick: 'B is not there.',
  make: (folder) => {
    adapter(folder, ({ shapes }) => {
      delete shapes[LORA_B]
    })
  },
  doors: ADAPTER,
  code: 'ERR_ADAPTER_INVALID',
  subject: /q_proj/,
} satisfies Attack
