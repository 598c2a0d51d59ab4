import { CHECKPOINT, type Attack } from '../attack.js'
import { safetensors, weights } from '../forge.js'

export default {
  trick: 'The header is not UTF-8.',
  make: (folder) => weights(folder, safetensors(Buffer.from([0x7b, 0xff, 0xfe, 0x7d]))),
  doors: CHECKPOINT,
  code: 'ERR_CHECKPOINT_CORRUPT',
  subject: /model\.safetensors$/,
} satisfies Attack
