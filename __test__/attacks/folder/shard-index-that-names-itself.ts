import { rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'

import { CHECKPOINT, type Attack } from '../attack.js'
import { checkpoint } from '../forge.js'

export default {
  trick: 'The index says that a tensor lies in the index.',
  make: (folder) => {
    const source = checkpoint(folder)
    rmSync(join(source, 'model.safetensors'))
    const index = { weight_map: { 'model.norm.weight': 'model.safetensors.index.json' } }
    writeFileSync(join(source, 'model.safetensors.index.json'), JSON.stringify(index))
  },
  doors: CHECKPOINT,
  code: 'ERR_CHECKPOINT_CORRUPT',
  subject: /index\.json$/,
} satisfies Attack
