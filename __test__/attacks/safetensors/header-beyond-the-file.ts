import { CHECKPOINT, type Attack } from '../attack.js'
import { safetensors, weights } from '../forge.js'

export default {
  trick: 'The header claims more bytes than the file has.',
  make: (folder) => weights(folder, safetensors('{}', new Uint8Array(8), 1_000_000n)),
  doors: CHECKPOINT,
  code: 'ERR_CHECKPOINT_CORRUPT',
  subject: /model\.safetensors$/,
} satisfies Attack
