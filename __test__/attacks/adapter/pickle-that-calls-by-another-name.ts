import { ADAPTER, type Attack } from '../attack.js'
import { torchAdapter, zip } from '../forge.js'

export default {
  trick: 'The pickle calls posix.system through a reduced object.',
  make: (folder) =>
    torchAdapter(
      folder,
      zip([{ name: 'a/data.pkl', data: Buffer.from('\x80\x02cposix\nsystem\n(X\x02\x00\x00\x00idtR.', 'latin1') }]),
    ),
  doors: ADAPTER,
  code: 'ERR_ADAPTER_INVALID',
  subject: /adapter_model\.bin$/,
} satisfies Attack
