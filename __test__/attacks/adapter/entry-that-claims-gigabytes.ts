import { ADAPTER, type Attack } from '../attack.js'
import { torchAdapter, zip } from '../forge.js'

export default {
  trick: 'The directory says that an entry has four gigabytes.',
  make: (folder) => torchAdapter(folder, zip([{ name: 'a/data.pkl', data: Buffer.from('}.'), claimed: 0xfffffff0 }])),
  doors: ADAPTER,
  code: 'ERR_ADAPTER_INVALID',
  subject: /adapter_model\.bin$/,
} satisfies Attack
