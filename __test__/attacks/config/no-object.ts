import { writeFileSync } from 'node:fs'
import { join } from 'node:path'

import { CHECKPOINT, type Attack } from '../attack.js'
import { checkpoint } from '../forge.js'

export default {
  trick: 'It is a list.',
  make: (folder) => {
    writeFileSync(join(checkpoint(folder), 'config.json'), '[]')
  },
  doors: CHECKPOINT,
  code: 'ERR_CONFIG_INVALID',
  subject: /config\.json$/,
} satisfies Attack
