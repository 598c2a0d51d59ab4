import type { Attack } from '../attack.js'
import { checkpoint, replaceTensor } from '../forge.js'

const LINEAR = 'model.layers.0.self_attn.q_proj'

export default {
  trick: 'The sizes fit the packed codes, but not the model.',
  make: (folder) => {
    checkpoint(folder, (parts) => {
      parts.config['quantization_config'] = {
        quant_method: 'compressed-tensors',
        format: 'pack-quantized',
        config_groups: { group_0: { targets: ['Linear'], weights: { num_bits: 4, group_size: 32 } } },
      }
      replaceTensor(parts, `${LINEAR}.weight`, {
        [`${LINEAR}.weight_packed`]: { dtype: 'I32', shape: [16, 8], data: new Uint8Array(512) },
        [`${LINEAR}.weight_scale`]: { dtype: 'F32', shape: [16, 2], data: new Uint8Array(128) },
        [`${LINEAR}.weight_shape`]: {
          dtype: 'I64',
          shape: [2],
          data: new Uint8Array(BigInt64Array.of(16n, 64n).buffer),
        },
      })
    })
  },
  doors: ['load'],
  code: 'ERR_CHECKPOINT_SHAPE',
  subject: /q_proj/,
} satisfies Attack
