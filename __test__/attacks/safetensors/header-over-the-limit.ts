import { CHECKPOINT, type Attack } from '../attack.js'
import { safetensors, weights } from '../forge.js'

export default {
  trick: 'The header is there, and longer than the format allows.',
  make: (folder) => weights(folder, safetensors(Buffer.alloc(100_000_001, ' '))),
  doors: CHECKPOINT,
  code: 'ERR_CHECKPOINT_CORRUPT',
  subject: /model\.safetensors$/,
} satisfies Attack
