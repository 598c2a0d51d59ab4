import { writeFileSync } from 'node:fs'
import { join } from 'node:path'

import { ADAPTER, type Attack } from '../attack.js'
import { adapter } from '../forge.js'

export default {
  trick: 'Alpha is larger than any number.',
  make: (folder) => {
    const path = join(adapter(folder), 'adapter_config.json')
    writeFileSync(path, '{"peft_type":"LORA","r":2,"lora_alpha":1e999}')
  },
  doors: ADAPTER,
  code: 'ERR_ADAPTER_INVALID',
  subject: /adapter_config\.json$/,
} satisfies Attack
