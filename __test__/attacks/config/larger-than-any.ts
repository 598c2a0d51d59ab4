import { writeFileSync } from 'node:fs'
import { join } from 'node:path'

import { CHECKPOINT, type Attack } from '../attack.js'
import { checkpoint } from '../forge.js'

export default {
  trick: 'It is twenty megabytes of spaces.',
  make: (folder) => {
    writeFileSync(join(checkpoint(folder), 'config.json'), ' '.repeat(20_000_000))
  },
  doors: CHECKPOINT,
  code: 'ERR_CONFIG_INVALID',
  subject: /config\.json$/,
} satisfies Attack
