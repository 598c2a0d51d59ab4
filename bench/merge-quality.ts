// What merges of adapters are worth: held-out perplexity of each domain, by method, rank and weight, as Markdown; and the
// share of the gain of the single adapters that is kept, the mean of ln(base / merged) / ln(base / single) over the domains
// whose adapter gains something, and of the sums over all domains (together).
// Rows are printed as they come.
//
//   node --import=tsx bench/merge-quality.ts --checkpoint DIR --adapters DIR --texts DIR --domains a,b,…
//     [--weights 0.3333,0.5,1] [--ranks 8,16,24] [--rows NAME,…] [--characters N] [--peer FILE.csv] [--calibration FILE]
//
// --adapters holds a PEFT folder per domain, --texts an eval-DOMAIN.txt per domain, of which the first N characters are
// read. --peer compares with figures that peft has reached (bench/peers/merge_quality_peft.csv), for rows of the same
// method, --calibration adds rows whose errors count by saved statistics of the checkpoint.
import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { parseArgs } from 'node:util'

import { loadModel, merge, type MergeOptions, type Model } from 'kintsugi'

const LENGTH = 256
/** Domains whose adapter gains less, in nats per token, have no share that could be kept. */
const LEAST_GAIN = 0.05

const { values: given } = parseArgs({
  options: {
    checkpoint: { type: 'string' },
    adapters: { type: 'string' },
    texts: { type: 'string' },
    domains: { type: 'string' },
    weights: { type: 'string', default: '0.3333,0.5,1' },
    ranks: { type: 'string', default: '8,16,24' },
    rows: { type: 'string' },
    characters: { type: 'string', default: '1e9' },
    peer: { type: 'string' },
    calibration: { type: 'string' },
  },
})
const { checkpoint, adapters, texts, calibration } = given
if (!checkpoint || !adapters || !texts || !given.domains) {
  throw new Error('--checkpoint, --adapters, --texts and --domains are needed')
}
const domains = given.domains.split(',')
const weights = given.weights.split(',').map(Number)
const ranks = given.ranks.split(',').map(Number)

/** `peer` is what peft calls the same at rank 8. */
type Row = Omit<MergeOptions, 'out' | 'weights'> & { name: string; peer?: string }

const plain = { parameterReweighting: false, outputReweighting: false }
const ofRank = (rank: number): Row[] => [
  { name: `svd ${rank}`, method: 'svd', rank, peer: 'svd' },
  ...(calibration ? [{ name: `svd ${rank} by outputs`, method: 'svd', rank, calibration } satisfies Row] : []),
  { name: `lego ${rank}`, method: 'lego', rank },
  { name: `lego ${rank} without reweighting`, method: 'lego', rank, ...plain },
  { name: `lego ${rank} closed-form`, method: 'lego', rank, scale: 'closed-form' },
  { name: `lego-gauge-free ${rank}`, method: 'lego-gauge-free', rank },
  { name: `lego-gauge-free ${rank} svd gauge`, method: 'lego-gauge-free', rank, gauge: 'svd' },
  { name: `ties ${rank}`, method: 'ties', rank, peer: 'ties_svd' },
  { name: `ties ${rank} core`, method: 'ties', rank, coordinates: 'core' },
  { name: `knots ${rank}`, method: 'knots', rank },
  { name: `dare-linear ${rank}`, method: 'dare-linear', rank },
  { name: `dare-ties ${rank}`, method: 'dare-ties', rank },
  { name: `magnitude-prune ${rank}`, method: 'magnitude-prune', rank },
  { name: `tsv ${rank}`, method: 'tsv', rank },
  { name: `iso-c ${rank}`, method: 'iso-c', rank },
]
const ofFactors: Row[] = [
  { name: 'linear', method: 'linear', peer: 'linear' },
  { name: 'ties on factors', method: 'ties', coordinates: 'factors', peer: 'ties' },
  { name: 'dare-linear on factors', method: 'dare-linear', coordinates: 'factors', peer: 'dare_linear' },
  { name: 'dare-ties on factors', method: 'dare-ties', coordinates: 'factors', peer: 'dare_ties' },
  { name: 'magnitude-prune on factors', method: 'magnitude-prune', coordinates: 'factors' },
]
const rows = [{ name: 'cat', method: 'cat', peer: 'cat' } satisfies Row, ...ofFactors, ...ranks.flatMap(ofRank)]
const selected = given.rows?.split(',')

const held = new Map<string, string>()
for (const domain of domains) {
  held.set(domain, (await readFile(join(texts, `eval-${domain}.txt`), 'utf8')).slice(0, Number(given.characters)))
}

async function measure(model: Model, adapter?: string): Promise<number[]> {
  const found: number[] = []
  for (const text of held.values()) {
    found.push((await model.perplexity(text, { length: LENGTH, ...(adapter && { adapter }) })).perplexity)
  }
  return found
}

/** What peft has reached: perplexities by method and weight. */
async function readPeer(path: string): Promise<Map<string, number[]>> {
  const [head, ...lines] = (await readFile(path, 'utf8')).trim().split('\n')
  const columns = domains.map((domain) => head!.split(',').indexOf(domain))
  if (columns.includes(-1)) return new Map()
  return new Map(
    lines.map((line) => {
      const cells = line.split(',')
      return [`${cells[0]} ${Number(cells[1]).toFixed(2)}`, columns.map((column) => Number(cells[column]))]
    }),
  )
}

const cells = (values: number[]): string => values.map((value) => value.toFixed(2)).join(' | ')
const percent = (share: number): string => `${(share * 100).toFixed(1)} %`
const sum = (values: number[]): number => values.reduce((total, value) => total + value, 0)
const mean = (values: number[]): number => sum(values) / values.length

const peer = given.peer ? await readPeer(given.peer) : new Map<string, number[]>()
const sources = domains.map((domain) => join(adapters, domain))
using model = await loadModel(checkpoint, {
  precision: 'f32',
  adapters: Object.fromEntries(domains.map((domain, index) => [domain, sources[index]!])),
})
const base = await measure(model)
const single: number[][] = []
for (const domain of domains) single.push(await measure(model, domain))
const gain = (i: number): number => Math.log(base[i]! / single[i]![i]!)
const counted = domains.map((_, i) => i).filter((i) => gain(i) >= LEAST_GAIN)
const kept = (found: number[]): number => mean(counted.map((i) => Math.log(base[i]! / found[i]!) / gain(i)))
const together = (found: number[]): number =>
  sum(found.map((value, i) => Math.log(base[i]! / value))) / sum(domains.map((_, i) => gain(i)))

console.log(`| | ${domains.join(' | ')} |\n|---|${'---|'.repeat(domains.length)}\n| base | ${cells(base)} |`)
for (const [index, domain] of domains.entries()) console.log(`| ${domain} alone | ${cells(single[index]!)} |`)
console.log(`\nGain kept: over ${counted.map((i) => domains[i]).join(', ')}.`)
const peerHead = peer.size > 0 ? ' peft | |' : ''
const rule = '---|'.repeat(domains.length + 4 + (peer.size > 0 ? 2 : 0))
console.log(`\n| method | weight | ${domains.join(' | ')} | gain kept | together |${peerHead}\n|${rule}`)

const folder = await mkdtemp(join(tmpdir(), 'kintsugi-merge-'))
try {
  for (const weight of weights) {
    for (const { name, peer: peerName, ...options } of rows) {
      if (selected && !selected.includes(name)) continue
      const out = join(folder, 'merged')
      try {
        await merge(sources, { ...options, out, weights: sources.map(() => weight), report: false })
      } catch (error) {
        console.log(`| ${name} | ${weight.toFixed(2)} |${' |'.repeat(domains.length + 1)} ${(error as Error).message} |`)
        continue
      }
      using merged = await loadModel(checkpoint, { precision: 'f32', adapters: { merged: out } })
      await rm(out, { recursive: true })
      const found = await measure(merged, 'merged')
      const theirs = options.rank === undefined || options.rank === 8 ? peer.get(`${peerName} ${weight.toFixed(2)}`) : undefined
      const versus = theirs ? ` ${percent(kept(theirs))} | ${verdict(found, theirs)} |` : peer.size > 0 ? ' | |' : ''
      console.log(`| ${name} | ${weight.toFixed(2)} | ${cells(found)} | ${percent(kept(found))} | ${percent(together(found))} |${versus}`)
    }
  }
} finally {
  await rm(folder, { recursive: true })
}

/** Against the peer, to the two digits that are recorded of it. */
function verdict(found: number[], theirs: number[]): string {
  const close = found.every((value, i) => Math.abs(value - theirs[i]!) <= 0.006 + 5e-4 * theirs[i]!)
  return close ? 'the same' : kept(found) > kept(theirs) ? 'ahead' : 'behind'
}
