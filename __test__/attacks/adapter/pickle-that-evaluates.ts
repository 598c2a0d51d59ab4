import { ADAPTER, type Attack } from '../attack.js'
import { torchAdapter, zip } from '../forge.js'

export default {
  trick: 'The pickle gives a text to eval.',
  make: (folder) =>
    torchAdapter(
      folder,
      zip([{ name: 'a/data.pkl', data: Buffer.from('\x80\x02cbuiltins\neval\nX\x01\x00\x00\x001\x85R.', 'latin1') }]),
    ),
  doors: ADAPTER,
  code: 'ERR_ADAPTER_INVALID',
  subject: /adapter_model\.bin$/,
} satisfies Attack
