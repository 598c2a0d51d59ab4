import { CHECKPOINT, type Attack } from '../attack.js'
import { safetensors, weights } from '../forge.js'

export default {
  trick: 'The product of the sizes does not fit into a number.',
  make: (folder) =>
    weights(
      folder,
      safetensors('{"a":{"dtype":"F32","shape":[4294967296,4294967296,16],"data_offsets":[0,0]}}', new Uint8Array(0)),
    ),
  doors: CHECKPOINT,
  code: 'ERR_CHECKPOINT_CORRUPT',
  subject: /model\.safetensors$/,
} satisfies Attack
