import { writeFileSync } from 'node:fs'
import { join } from 'node:path'

import { CHECKPOINT, type Attack } from '../attack.js'
import { checkpoint } from '../forge.js'

export default {
  trick: 'A hundred thousand brackets are opened.',
  make: (folder) => {
    writeFileSync(join(checkpoint(folder), 'config.json'), `{"a":${'['.repeat(100_000)}`)
  },
  doors: CHECKPOINT,
  code: 'ERR_CONFIG_INVALID',
  subject: /config\.json$/,
} satisfies Attack
