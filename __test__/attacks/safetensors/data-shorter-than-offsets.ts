import { CHECKPOINT, type Attack } from '../attack.js'
import { safetensors, weights } from '../forge.js'

export default {
  trick: 'The last tensor ends behind the file.',
  make: (folder) =>
    weights(folder, safetensors('{"a":{"dtype":"U8","shape":[64],"data_offsets":[0,64]}}', new Uint8Array(60))),
  doors: CHECKPOINT,
  code: 'ERR_CHECKPOINT_CORRUPT',
  subject: /model\.safetensors$/,
} satisfies Attack
