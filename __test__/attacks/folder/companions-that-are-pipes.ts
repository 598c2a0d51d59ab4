import { join } from 'node:path'

import { CHECKPOINT, type Attack } from '../attack.js'
import { checkpoint, pipe } from '../forge.js'

export default {
  trick: 'Files that are only copied are named pipes; they are left out.',
  make: (folder) => {
    const source = checkpoint(folder)
    for (const name of ['LICENSE', 'README.md', 'generation_config.json', 'chat_template.jinja'])
      pipe(join(source, name))
  },
  doors: CHECKPOINT,
  code: null,
  unix: true,
} satisfies Attack
