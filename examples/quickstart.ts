// Compresses a checkpoint to 4 bits with a compensation, loads what was written, and continues a text.
// usage: quickstart.ts [CHECKPOINT] [CALIBRATION TEXT] [OUT]
import { mkdtemp } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

import { compress, loadModel } from 'kintsugi'

const [checkpoint = 'assets/tinystories-656k', text = 'assets/text/eval-stories.txt', given] = process.argv.slice(2)
const out = given ?? join(await mkdtemp(join(tmpdir(), 'kintsugi-')), 'w4')

const job = compress(checkpoint, {
  out,
  method: 'gptq',
  bits: 4,
  groupSize: 64,
  calibration: { text, sequences: 32, length: 256 },
  eora: { rank: 16 },
})
for await (const { phase, done, total, unit } of job.progress()) console.error(phase, `${done}/${total}`, unit)

const { summary } = await job
console.log(`${out}: ${summary.bitsPerWeight.toFixed(2)} bits per weight`)

using model = await loadModel(out)
const generation = model.generate('Once upon a time', { maxTokens: 40 })
process.stdout.write('Once upon a time')
for await (const piece of generation) process.stdout.write(piece.text)
console.log(`\n(${generation.summary?.tokens} tokens)`)
