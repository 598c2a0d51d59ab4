import { CHECKPOINT, type Attack } from '../attack.js'
import { safetensors, weights } from '../forge.js'

export default {
  trick: 'The header is a hundred megabytes of spaces.',
  make: (folder) => weights(folder, safetensors(Buffer.alloc(100_000_000, ' '))),
  doors: CHECKPOINT,
  code: 'ERR_CHECKPOINT_CORRUPT',
  subject: /model\.safetensors$/,
} satisfies Attack
