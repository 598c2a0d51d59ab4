import { ADAPTER, type Attack } from '../attack.js'
import { torchAdapter, zip } from '../forge.js'

export default {
  trick: 'The archive names files above the folder; nothing is unpacked.',
  make: (folder) => torchAdapter(folder, zip([{ name: '../../../../tmp/evil', data: Buffer.from('x') }])),
  doors: ADAPTER,
  code: 'ERR_ADAPTER_INVALID',
  subject: /adapter_model\.bin$/,
} satisfies Attack
