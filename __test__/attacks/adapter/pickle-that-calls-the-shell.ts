import { ADAPTER, type Attack } from '../attack.js'
import { torchAdapter, zip } from '../forge.js'

export default {
  trick: 'The pickle calls os.system when Python reads it.',
  make: (folder) =>
    torchAdapter(
      folder,
      zip([{ name: 'a/data.pkl', data: Buffer.from('cos\nsystem\n(X\x02\x00\x00\x00lstR.', 'latin1') }]),
    ),
  doors: ADAPTER,
  code: 'ERR_ADAPTER_INVALID',
  subject: /adapter_model\.bin$/,
} satisfies Attack
