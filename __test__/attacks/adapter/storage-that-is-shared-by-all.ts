import { ADAPTER, type Attack } from '../attack.js'
import { statePickle, torchAdapter, zip } from '../forge.js'

const TENSORS: Record<string, [number, number]> = {}
for (let i = 0; i < 500; i++) {
  TENSORS[`base_model.model.model.layers.${i}.q_proj.lora_A.weight`] = [2, 1 << 17]
  TENSORS[`base_model.model.model.layers.${i}.q_proj.lora_B.weight`] = [1 << 17, 2]
}

export default {
  trick: 'A thousand tensors are the same megabyte.',
  make: (folder) =>
    torchAdapter(
      folder,
      zip([
        { name: 'a/data.pkl', data: statePickle(TENSORS) },
        { name: 'a/data/0', data: Buffer.alloc(1 << 20) },
      ]),
    ),
  doors: ADAPTER,
  code: 'ERR_ADAPTER_INVALID',
  subject: /adapter_model\.bin$/,
} satisfies Attack
