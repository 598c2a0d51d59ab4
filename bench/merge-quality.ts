// What merges of three adapters are worth: held-out perplexity of each domain, by method, rank and weight, as a Markdown
// table; and the share of the gain of the single adapters that is kept, in log-perplexity.
// usage: merge-quality.ts CHECKPOINT ADAPTERS TEXTS DOMAIN,DOMAIN,... [CHARACTERS] [WEIGHT,WEIGHT,...] [ROW,ROW,...]
//   ADAPTERS/DOMAIN are PEFT folders, TEXTS/eval-DOMAIN.txt the held-out texts, of which CHARACTERS are read
import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

import { loadModel, merge, type MergeOptions, type Model } from 'kintsugi'

const [checkpoint, adapters, texts, list = '', characters = '1e9', weights, rows] = process.argv.slice(2)
if (!checkpoint || !adapters || !texts || !list) throw new Error('usage: CHECKPOINT ADAPTERS TEXTS DOMAINS [CHARACTERS]')
const domains = list.split(',')
const LENGTH = 256

type Row = Omit<MergeOptions, 'out' | 'weights'> & { name: string }
const RANKS = [8, 16, 24]
const ROWS: Row[] = [
  { name: 'linear', method: 'linear' },
  { name: 'cat', method: 'cat' },
  ...RANKS.map((rank): Row => ({ name: `svd ${rank}`, method: 'svd', rank })),
  ...RANKS.map((rank): Row => ({ name: `lego ${rank}`, method: 'lego', rank })),
  ...RANKS.map(
    (rank): Row => ({ name: `lego ${rank}, no reweighting`, method: 'lego', rank, parameterReweighting: false, outputReweighting: false }),
  ),
  ...RANKS.map((rank): Row => ({ name: `lego-gauge-free ${rank}`, method: 'lego-gauge-free', rank })),
  ...RANKS.map((rank): Row => ({ name: `lego-gauge-free ${rank}, svd gauge`, method: 'lego-gauge-free', rank, gauge: 'svd' })),
  { name: 'ties on factors', method: 'ties', coordinates: 'factors' },
  ...RANKS.map((rank): Row => ({ name: `ties ${rank}`, method: 'ties', rank })),
  { name: 'ties 8, core', method: 'ties', rank: 8, coordinates: 'core' },
  { name: 'knots 8', method: 'knots', rank: 8 },
  { name: 'dare-linear on factors', method: 'dare-linear', coordinates: 'factors' },
  { name: 'dare-ties on factors', method: 'dare-ties', coordinates: 'factors' },
  { name: 'dare-linear 8', method: 'dare-linear', rank: 8 },
  { name: 'magnitude-prune 8', method: 'magnitude-prune', rank: 8 },
  ...RANKS.map((rank): Row => ({ name: `tsv ${rank}`, method: 'tsv', rank })),
  ...RANKS.map((rank): Row => ({ name: `iso-c ${rank}`, method: 'iso-c', rank })),
]
const WEIGHTS = weights?.split(',').map(Number) ?? [1 / domains.length, 0.5, 1]
const SELECTED = ROWS.filter(({ name }) => !rows || rows.split(',').includes(name.replace(',', '')))

const folder = await mkdtemp(join(tmpdir(), 'kintsugi-merge-'))
const held = new Map<string, string>()
for (const domain of domains) {
  held.set(domain, (await readFile(join(texts, `eval-${domain}.txt`), 'utf8')).slice(0, Number(characters)))
}

async function measure(model: Model, adapter?: string): Promise<number[]> {
  const found: number[] = []
  for (const text of held.values()) {
    found.push((await model.perplexity(text, { length: LENGTH, ...(adapter && { adapter }) })).perplexity)
  }
  return found
}

const sources = domains.map((domain) => join(adapters, domain))
using model = await loadModel(checkpoint, {
  precision: 'f32',
  adapters: Object.fromEntries(domains.map((domain, index) => [domain, sources[index]!])),
})
const base = await measure(model)
const single: number[][] = []
for (const domain of domains) single.push(await measure(model, domain))
const cells = (values: number[]): string => values.map((value) => value.toFixed(2)).join(' | ')

console.log(`| | ${domains.join(' | ')} |\n|---|${'---|'.repeat(domains.length)}\n| base | ${cells(base)} |`)
for (const [index, domain] of domains.entries()) console.log(`| ${domain} alone | ${cells(single[index]!)} |`)
console.log(`\n| method | weight | ${domains.join(' | ')} | gain kept |\n|---|---|${'---|'.repeat(domains.length + 1)}`)
try {
  for (const weight of WEIGHTS) {
    for (const [index, { name, ...options }] of SELECTED.entries()) {
      const out = join(folder, `${index}-${weight}`)
      await merge(sources, { ...options, out, weights: sources.map(() => weight), report: false })
      using merged = await loadModel(checkpoint, { precision: 'f32', adapters: { merged: out } })
      const found = await measure(merged, 'merged')
      const kept = found.map((value, i) => Math.log(base[i]! / value) / Math.log(base[i]! / single[i]![i]!))
      const mean = kept.reduce((sum, share) => sum + share, 0) / kept.length
      console.log(`| ${name} | ${weight.toFixed(2)} | ${cells(found)} | ${(mean * 100).toFixed(1)} % |`)
    }
  }
} finally {
  await rm(folder, { recursive: true })
}
