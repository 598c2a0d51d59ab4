import { ADAPTER, type Attack } from '../attack.js'
import { adapter } from '../forge.js'

export default {
  trick: 'The rank is zero, by which alpha is divided.',
  make: (folder) => {
    adapter(folder, ({ config }) => {
      config['r'] = 0
    })
  },
  doors: ADAPTER,
  code: 'ERR_ADAPTER_INVALID',
  subject: /adapter_config\.json$/,
} satisfies Attack
