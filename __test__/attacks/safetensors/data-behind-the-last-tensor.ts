import { CHECKPOINT, type Attack } from '../attack.js'
import { safetensors, weights } from '../forge.js'

export default {
  trick: 'Bytes follow the last tensor.',
  make: (folder) =>
    weights(folder, safetensors('{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', new Uint8Array(64))),
  doors: CHECKPOINT,
  code: 'ERR_CHECKPOINT_CORRUPT',
  subject: /model\.safetensors$/,
} satisfies Attack
