// Repairs a checkpoint that was compressed without a compensation, and loads it with all of the repair, with a part of it
// and with none.
// usage: compensate.ts [CHECKPOINT] [CALIBRATION TEXT] [TEXT]
import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

import { compensate, compress, loadModel } from 'kintsugi'

const [
  original = 'assets/tinystories-656k',
  calibrationText = 'assets/text/eval-stories.txt',
  textFile = 'assets/text/eval-stories.txt',
] = process.argv.slice(2)
const folder = await mkdtemp(join(tmpdir(), 'kintsugi-'))
const [compressed, out] = [join(folder, 'w2'), join(folder, 'eora')]
await compress(original, { out: compressed, method: 'rtn', bits: 2, groupSize: 32 })

const { summary } = await compensate(original, compressed, {
  out,
  calibration: { text: calibrationText, sequences: 16, length: 128 },
  eora: { rank: 16, factorBits: 8 },
})
const { certified, holdOut } = summary.compensation!
const percent = (share: number): string => `${(100 * share).toFixed(1)} %`
console.log(`${summary.bytes} bytes of factors, ${certified} Linears certified to have the best of their rank`)
if (holdOut) console.log(`on tokens that took no part: ${percent(holdOut.quantized)} → ${percent(holdOut.compensated)}`)

// Not what the calibration has read.
const text = (await readFile(textFile, 'utf8')).slice(50_000, 70_000)
for (const [name, options] of [
  ['without', { compensation: false }],
  ['rank 4', { compensation: out, eoraRank: 4 }],
  ['rank 16', { compensation: out }],
] as const) {
  using model = await loadModel(compressed, options)
  const { perplexity } = await model.perplexity(text, { length: 128 })
  console.log(`${name}: perplexity ${perplexity.toFixed(2)}`)
}
await rm(folder, { recursive: true })
