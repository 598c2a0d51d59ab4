import { rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'

import { CHECKPOINT, type Attack } from '../attack.js'
import { checkpoint } from '../forge.js'

export default {
  trick: 'The name of a shard has a zero byte, at which the system would cut it.',
  make: (folder) => {
    const source = checkpoint(folder)
    rmSync(join(source, 'model.safetensors'))
    const index = { weight_map: { 'model.norm.weight': 'model.safetensors\0.txt' } }
    writeFileSync(join(source, 'model.safetensors.index.json'), JSON.stringify(index))
  },
  doors: CHECKPOINT,
  code: 'ERR_CHECKPOINT_CORRUPT',
  subject: /model\.safetensors\.index\.json$/,
} satisfies Attack
