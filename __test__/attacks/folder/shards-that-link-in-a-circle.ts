import { rmSync, symlinkSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'

import { CHECKPOINT, type Attack } from '../attack.js'
import { checkpoint } from '../forge.js'

export default {
  trick: 'A shard is a link to a link to itself.',
  make: (folder) => {
    const source = checkpoint(folder)
    const [whole, shard] = [join(source, 'model.safetensors'), join(source, 'one.safetensors')]
    rmSync(whole)
    symlinkSync(shard, join(source, 'two.safetensors'))
    symlinkSync(join(source, 'two.safetensors'), shard)
    const index = { weight_map: { 'model.norm.weight': 'one.safetensors' } }
    writeFileSync(join(source, 'model.safetensors.index.json'), JSON.stringify(index))
  },
  doors: CHECKPOINT,
  code: 'ERR_CHECKPOINT_NOT_FOUND',
  subject: /one\.safetensors$/,
  unix: true,
} satisfies Attack
