import { mkdirSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'

import type { Attack } from '../attack.js'
import { checkpoint } from '../forge.js'

export default {
  trick: 'The ledger ends inside of its first line: nothing was finished, so the job starts anew.',
  make: (folder) => {
    checkpoint(folder)
    mkdirSync(join(folder, 'out.partial'))
    writeFileSync(join(folder, 'out.partial', 'ledger.jsonl'), '{"version":"0.1.0","eng')
  },
  doors: ['compress'],
  code: null,
} satisfies Attack
