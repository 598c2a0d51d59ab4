import { rmSync } from 'node:fs'
import { join } from 'node:path'

import { CHECKPOINT, type Attack } from '../attack.js'
import { checkpoint, pipe } from '../forge.js'

export default {
  trick: 'config.json is a named pipe.',
  make: (folder) => {
    const config = join(checkpoint(folder), 'config.json')
    rmSync(config)
    pipe(config)
  },
  doors: CHECKPOINT,
  code: 'ERR_CONFIG_INVALID',
  subject: /config\.json$/,
  unix: true,
} satisfies Attack
