import { mkdirSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'

import type { Attack } from '../attack.js'
import { checkpoint } from '../forge.js'

export default {
  trick: 'The ledger belongs to another job; going on with it would mix two models.',
  make: (folder) => {
    checkpoint(folder)
    mkdirSync(join(folder, 'out.partial'))
    const first = { version: '0.0.0', engine: 'abacus', recipe: {}, inputs: {} }
    writeFileSync(join(folder, 'out.partial', 'ledger.jsonl'), `${JSON.stringify(first)}\n{"part":null}\n`)
  },
  doors: ['compress'],
  code: 'ERR_RESUME_MISMATCH',
  subject: /out\.partial$/,
} satisfies Attack
