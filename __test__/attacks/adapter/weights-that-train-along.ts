import { ADAPTER, type Attack } from '../attack.js'
import { adapter } from '../forge.js'

export default {
  trick: 'Whole modules were trained, which would be lost.',
  make: (folder) => {
    adapter(folder, ({ config }) => {
      config['modules_to_save'] = ['lm_head']
    })
  },
  doors: ADAPTER,
  code: 'ERR_ADAPTER_INVALID',
  subject: /adapter_config\.json$/,
} satisfies Attack
