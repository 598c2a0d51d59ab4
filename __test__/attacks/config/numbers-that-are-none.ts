import { writeFileSync } from 'node:fs'
import { join } from 'node:path'

import { CHECKPOINT, type Attack } from '../attack.js'
import { checkpoint } from '../forge.js'

export default {
  trick: 'Python writes NaN, which is no JSON.',
  make: (folder) => {
    writeFileSync(join(checkpoint(folder), 'config.json'), '{"architectures":["LlamaForCausalLM"],"rope_theta":NaN}')
  },
  doors: CHECKPOINT,
  code: 'ERR_CONFIG_INVALID',
  subject: /config\.json$/,
} satisfies Attack
