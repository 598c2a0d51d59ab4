// What the weights of a rank budget are worth: perplexity, and divergence from the uncompressed model, with one rank for
// all Linears and with as many bytes divided by each kind of weights, as Markdown.
//
//   node --import=tsx bench/rank-weights.ts --checkpoint DIR[,DIR…] --text FILE --calibration FILE
//     [--methods rtn,gptq] [--bits 2,3] [--mean-rank 8] [--rank 32] [--multiple 4] [--weights outputs,equal,ablation]
//     [--seeds 1,2,3] [--sequences 32] [--hold-out 8] [--length 256] [--characters N] [--groups]
//
// Each seed chooses other sequences of the calibration text; numbers are means over the seeds, and `taken` says how often
// the divided ranks were better than one rank on what was held out: where they were not, the row counts one rank.
// `--groups` prints what the ablations of the first seed have found, too.
import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { basename, join } from 'node:path'
import { parseArgs } from 'node:util'

import { compensate, compress, type CompressOptions, type EoraOptions, loadModel, type RankAblation } from 'kintsugi'

const { values: given } = parseArgs({
  options: {
    checkpoint: { type: 'string' },
    text: { type: 'string' },
    calibration: { type: 'string' },
    methods: { type: 'string', default: 'rtn,gptq' },
    bits: { type: 'string', default: '2,3' },
    'mean-rank': { type: 'string', default: '8' },
    rank: { type: 'string', default: '32' },
    multiple: { type: 'string', default: '4' },
    weights: { type: 'string', default: 'outputs,equal,ablation' },
    seeds: { type: 'string', default: '1,2,3' },
    sequences: { type: 'string', default: '32' },
    'hold-out': { type: 'string', default: '8' },
    length: { type: 'string', default: '256' },
    characters: { type: 'string', default: '1e9' },
    groups: { type: 'boolean', default: false },
  },
})
if (!given.checkpoint || !given.text || !given.calibration) {
  throw new Error('--checkpoint, --text and --calibration are needed')
}
const text = (await readFile(given.text, 'utf8')).slice(0, Number(given.characters))
const [meanRank, rank, length] = [Number(given['mean-rank']), Number(given.rank), Number(given.length)]
const numbers = (list: string): number[] => list.split(',').map(Number)
const scratch = await mkdtemp(join(tmpdir(), 'kintsugi-weights-'))
let outputs = 0
const fresh = (): string => join(scratch, String(outputs++))

interface Found {
  perplexity: number
  divergence: number
  taken: boolean
  ablation?: RankAblation
}

const row = (...cells: (string | number)[]): void => console.log(`| ${cells.join(' | ')} |`)
const groups: string[] = []
row('model', 'base', 'bits', 'ranks', 'perplexity', 'divergence', 'taken')
row('---', '---', '---', '---', '---', '---', '---')
for (const checkpoint of given.checkpoint.split(',')) {
  using reference = await loadModel(checkpoint)
  const judge = async (folder: string, compensation?: string): Promise<Found> => {
    using model = await loadModel(folder, { ...(compensation !== undefined && { compensation }) })
    const { perplexity, meanKlDivergence } = await model.divergence(reference, text, { length })
    return { perplexity, divergence: meanKlDivergence, taken: false }
  }
  row(basename(checkpoint), '', 16, 'uncompressed', (await judge(checkpoint)).perplexity.toFixed(3), '', '')
  for (const method of given.methods.split(',') as NonNullable<CompressOptions['method']>[]) {
    for (const bits of numbers(given.bits) as NonNullable<CompressOptions['bits']>[]) {
      const rows = new Map<string, Found[]>()
      const add = (name: string, found: Found): void => void rows.set(name, [...(rows.get(name) ?? []), found])
      for (const seed of numbers(given.seeds)) {
        const sizes = { sequences: Number(given.sequences), holdOut: Number(given['hold-out']), length }
        const calibration = { file: given.calibration, seed, ...sizes }
        const base = fresh()
        await compress(checkpoint, { out: base, method, bits, groupSize: 64, calibration })
        const solve = async (eora: EoraOptions): Promise<Found> => {
          const out = fresh()
          const { summary } = await compensate(checkpoint, base, { out, calibration, eora })
          const allocation = summary.compensation?.allocation
          const found = { ...(await judge(base, out)), taken: allocation?.chosen === 'allocated' }
          return { ...found, ...(allocation?.ablation && { ablation: allocation.ablation }) }
        }
        add('no compensation', await judge(base))
        add(`rank ${meanRank}`, await solve({ rank: meanRank }))
        for (const rankWeights of given.weights.split(',') as NonNullable<EoraOptions['rankWeights']>[]) {
          const found = await solve({ meanRank, rank, rankMultiple: Number(given.multiple), rankWeights })
          add(rankWeights, found)
          if (found.ablation && !rows.get(rankWeights)![1]) {
            const { types, bands } = found.ablation
            const told = [...types, ...bands].map(
              (group) => `${group.name}: ${group.cost.toExponential(2)} nats for ${group.removed.toFixed(4)}, × ${group.factor.toFixed(2)}`,
            )
            groups.push(`\n${basename(checkpoint)}, ${method}, ${bits} bits: ${told.join('; ')}`)
          }
        }
        await rm(base, { recursive: true })
      }
      for (const [name, found] of rows) {
        const mean = (of: (one: Found) => number): number => found.reduce((sum, one) => sum + of(one), 0) / found.length
        const count = `${found.filter((one) => one.taken).length} of ${found.length}`
        const taken = given.weights.split(',').includes(name) ? count : ''
        const [perplexity, divergence] = [mean((one) => one.perplexity), mean((one) => one.divergence)]
        row(basename(checkpoint), method, bits, name, perplexity.toFixed(3), divergence.toFixed(5), taken)
      }
    }
  }
}
if (given.groups) console.log(groups.join('\n'))
await rm(scratch, { recursive: true })
