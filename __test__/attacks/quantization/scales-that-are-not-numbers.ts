import type { Attack } from '../attack.js'
import { checkpoint, replaceTensor } from '../forge.js'

const LINEAR = 'model.layers.0.self_attn.q_proj'

export default {
  trick: 'A scale is NaN.',
  make: (folder) => {
    checkpoint(folder, (parts) => {
      parts.config['quantization_config'] = {
        quant_method: 'compressed-tensors',
        format: 'pack-quantized',
        config_groups: { group_0: { targets: ['Linear'], weights: { num_bits: 4, group_size: 32 } } },
      }
      replaceTensor(parts, `${LINEAR}.weight`, {
        [`${LINEAR}.weight_packed`]: { dtype: 'I32', shape: [32, 4], data: new Uint8Array(512) },
        [`${LINEAR}.weight_scale`]: { dtype: 'F32', shape: [32, 1], data: new Uint8Array(128).fill(0xff) },
        [`${LINEAR}.weight_shape`]: {
          dtype: 'I64',
          shape: [2],
          data: new Uint8Array(BigInt64Array.of(32n, 32n).buffer),
        },
      })
    })
  },
  doors: ['load'],
  code: 'ERR_CHECKPOINT_NOT_FINITE',
  subject: /q_proj\.weight_scale$/,
} satisfies Attack
