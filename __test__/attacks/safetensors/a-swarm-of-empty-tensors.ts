import type { Attack } from '../attack.js'
import { safetensors, weights } from '../forge.js'

const entry = '":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
const HEADER = `{${Array.from({ length: 200_000 }, (_, i) => `"t${i}${entry}`).join(',')}}`

export default {
  trick: 'The header has two hundred thousand tensors, all of them empty.',
  make: (folder) => weights(folder, safetensors(HEADER)),
  doors: ['open'],
  code: null,
} satisfies Attack
