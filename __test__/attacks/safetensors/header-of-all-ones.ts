import { CHECKPOINT, type Attack } from '../attack.js'
import { safetensors, weights } from '../forge.js'

export default {
  trick: 'The length of the header is the largest number.',
  make: (folder) => weights(folder, safetensors('{}', new Uint8Array(8), 2n ** 64n - 1n)),
  doors: CHECKPOINT,
  code: 'ERR_CHECKPOINT_CORRUPT',
  subject: /model\.safetensors$/,
} satisfies Attack
