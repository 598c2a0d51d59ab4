import { ADAPTER, type Attack } from '../attack.js'
import { torchAdapter, zip } from '../forge.js'

export default {
  trick: 'The directory places an entry at the largest offset.',
  make: (folder) =>
    torchAdapter(folder, zip([{ name: 'a/data.pkl', data: Buffer.from('}.'), offset: 2n ** 64n - 8n }])),
  doors: ADAPTER,
  code: 'ERR_ADAPTER_INVALID',
  subject: /adapter_model\.bin$/,
} satisfies Attack
