import { ADAPTER, type Attack } from '../attack.js'
import { adapter } from '../forge.js'

export default {
  trick: 'The type of the adapter does not exist.',
  make: (folder) => {
    adapter(folder, ({ config }) => {
      config['peft_type'] = 'TELEPATHY'
    })
  },
  doors: ADAPTER,
  code: 'ERR_ADAPTER_INVALID',
  subject: /adapter_config\.json$/,
} satisfies Attack
