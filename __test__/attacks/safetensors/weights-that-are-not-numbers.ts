import type { Attack } from '../attack.js'
import { checkpoint } from '../forge.js'

export default {
  trick: 'A weight is NaN.',
  make: (folder) => {
    checkpoint(folder, ({ weights }) => {
      const [from] = weights.header['model.layers.0.self_attn.q_proj.weight']!.data_offsets
      weights.data.set([0xff, 0x7f, 0xff, 0x7f], from)
    })
  },
  doors: ['load', 'compress'],
  code: 'ERR_CHECKPOINT_NOT_FINITE',
  subject: /layers\.0\.self_attn\.q_proj/,
} satisfies Attack
