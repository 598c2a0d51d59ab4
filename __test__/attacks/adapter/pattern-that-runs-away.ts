import { ADAPTER, type Attack } from '../attack.js'
import { adapter } from '../forge.js'

export default {
  trick: 'A rank belongs to an expression that takes exponential time.',
  make: (folder) => {
    adapter(folder, ({ config }) => {
      config['rank_pattern'] = { '(.*)*(.*)*q_proj': 2 }
    })
  },
  doors: ADAPTER,
  code: 'ERR_ADAPTER_INVALID',
  subject: /adapter_config\.json$/,
} satisfies Attack
