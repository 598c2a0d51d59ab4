import { mkdirSync } from 'node:fs'
import { join } from 'node:path'

import type { Attack } from '../attack.js'
import { checkpoint, pipe } from '../forge.js'

export default {
  trick: 'The ledger that an interrupted job seems to have left is a named pipe.',
  make: (folder) => {
    checkpoint(folder)
    mkdirSync(join(folder, 'out.partial'))
    pipe(join(folder, 'out.partial', 'ledger.jsonl'))
  },
  doors: ['compress'],
  code: null,
  unix: true,
} satisfies Attack
