import { rmSync } from 'node:fs'
import { join } from 'node:path'

import type { Attack } from '../attack.js'
import { checkpoint, pipe } from '../forge.js'

export default {
  trick: 'tokenizer.json is a named pipe.',
  make: (folder) => {
    const tokenizer = join(checkpoint(folder), 'tokenizer.json')
    rmSync(tokenizer)
    pipe(tokenizer)
  },
  doors: ['load', 'compress'],
  code: 'ERR_TOKENIZER_INVALID',
  subject: /tokenizer\.json$/,
  unix: true,
} satisfies Attack
