import { rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'

import { CHECKPOINT, type Attack } from '../attack.js'
import { checkpoint } from '../forge.js'

export default {
  trick: 'The index names a shard that is not there.',
  make: (folder) => {
    const source = checkpoint(folder)
    rmSync(join(source, 'model.safetensors'))
    const index = { weight_map: { 'model.norm.weight': 'model-00001-of-00002.safetensors' } }
    writeFileSync(join(source, 'model.safetensors.index.json'), JSON.stringify(index))
  },
  doors: CHECKPOINT,
  code: 'ERR_CHECKPOINT_SHARD_MISSING',
  subject: /model-00001-of-00002\.safetensors$/,
} satisfies Attack
