import { CHECKPOINT, type Attack } from '../attack.js'
import { weights } from '../forge.js'

export default {
  trick: 'The file has no byte.',
  make: (folder) => weights(folder, new Uint8Array()),
  doors: CHECKPOINT,
  code: 'ERR_CHECKPOINT_CORRUPT',
  subject: /model\.safetensors$/,
} satisfies Attack
