import { mkdirSync, readdirSync, renameSync, symlinkSync } from 'node:fs'
import { join } from 'node:path'

import { CHECKPOINT, type Attack } from '../attack.js'
import { checkpoint } from '../forge.js'

export default {
  trick:
    'Every file is a link out of the folder. The cache of huggingface_hub consists of such links, so they are followed.',
  make: (folder) => {
    const source = checkpoint(folder)
    mkdirSync(join(folder, 'blobs'))
    for (const name of readdirSync(source)) {
      renameSync(join(source, name), join(folder, 'blobs', name))
      symlinkSync(join('..', 'blobs', name), join(source, name))
    }
  },
  doors: CHECKPOINT,
  code: null,
  unix: true,
} satisfies Attack
