import { deflateRawSync } from 'node:zlib'

import { ADAPTER, type Attack } from '../attack.js'
import { torchAdapter, zip } from '../forge.js'

export default {
  trick: 'An entry is compressed a thousandfold; torch compresses nothing.',
  make: (folder) =>
    torchAdapter(folder, zip([{ name: 'a/data.pkl', data: deflateRawSync(Buffer.alloc(100_000_000)), method: 8 }])),
  doors: ADAPTER,
  code: 'ERR_ADAPTER_INVALID',
  subject: /adapter_model\.bin$/,
} satisfies Attack
