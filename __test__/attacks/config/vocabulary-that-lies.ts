import type { Attack } from '../attack.js'
import { checkpoint } from '../forge.js'

export default {
  trick: 'The vocabulary is larger than the embedding.',
  make: (folder) => {
    checkpoint(folder, ({ config }) => Object.assign(config, { vocab_size: 2 ** 24 }))
  },
  doors: ['load', 'compress'],
  code: 'ERR_CHECKPOINT_SHAPE',
  subject: /embed_tokens/,
} satisfies Attack
