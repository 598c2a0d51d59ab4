import { rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'

import { CHECKPOINT, type Attack } from '../attack.js'
import { checkpoint } from '../forge.js'

export default {
  trick: 'The index climbs out with the separators of another system.',
  make: (folder) => {
    const source = checkpoint(folder)
    rmSync(join(source, 'model.safetensors'))
    const index = { weight_map: { 'model.norm.weight': '..\\..\\secrets.safetensors' } }
    writeFileSync(join(source, 'model.safetensors.index.json'), JSON.stringify(index))
  },
  doors: CHECKPOINT,
  code: 'ERR_CHECKPOINT_CORRUPT',
  subject: /model\.safetensors\.index\.json$/,
} satisfies Attack
