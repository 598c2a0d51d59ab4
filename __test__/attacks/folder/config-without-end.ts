import { rmSync, symlinkSync } from 'node:fs'
import { join } from 'node:path'

import { CHECKPOINT, type Attack } from '../attack.js'
import { checkpoint } from '../forge.js'

export default {
  trick: 'config.json is a device that gives zeros without end.',
  make: (folder) => {
    const config = join(checkpoint(folder), 'config.json')
    rmSync(config)
    symlinkSync('/dev/zero', config)
  },
  doors: CHECKPOINT,
  code: 'ERR_CONFIG_INVALID',
  subject: /config\.json$/,
  unix: true,
} satisfies Attack
