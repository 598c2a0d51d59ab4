import { ADAPTER, type Attack } from '../attack.js'
import { adapter } from '../forge.js'

export default {
  trick: 'The rank is 2^40; the factors have two.',
  make: (folder) => {
    adapter(folder, ({ config }) => {
      config['r'] = 2 ** 40
    })
  },
  doors: ADAPTER,
  code: 'ERR_ADAPTER_INVALID',
  subject: /./,
} satisfies Attack
