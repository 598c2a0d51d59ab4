import { ADAPTER, type Attack } from '../attack.js'
import { torchAdapter, zip } from '../forge.js'

export default {
  trick: 'A hundred thousand tuples lie in each other.',
  make: (folder) =>
    torchAdapter(
      folder,
      zip([{ name: 'a/data.pkl', data: Buffer.concat([Buffer.from(')'), Buffer.alloc(100_000, 0x85)]) }]),
    ),
  doors: ADAPTER,
  code: 'ERR_ADAPTER_INVALID',
  subject: /adapter_model\.bin$/,
} satisfies Attack
