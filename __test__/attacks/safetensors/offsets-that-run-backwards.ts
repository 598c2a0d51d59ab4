import { CHECKPOINT, type Attack } from '../attack.js'
import { safetensors, weights } from '../forge.js'

export default {
  trick: 'A tensor ends before it begins.',
  make: (folder) =>
    weights(folder, safetensors('{"a":{"dtype":"U8","shape":[4],"data_offsets":[4,0]}}', new Uint8Array(4))),
  doors: CHECKPOINT,
  code: 'ERR_CHECKPOINT_CORRUPT',
  subject: /model\.safetensors$/,
} satisfies Attack
