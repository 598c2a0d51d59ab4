// Which inputs a compensation is worth solving for: perplexity and errors against the original model with deployed inputs,
// with a share α of the mismatch of both models corrected, and with dense inputs, as Markdown.
//
//   node --import=tsx bench/compensation-inputs.ts --checkpoint DIR[,DIR…] --text FILE --calibration FILE
//     [--methods gptq,rtn] [--bits 2,3] [--rank 16] [--shares 0,0.25,0.5,1] [--sequences 32] [--length 256]
//     [--characters N] [--subset]
//
// The errors are means over the Linears of ‖WX − (Ŵ+BA)X̂‖ / ‖WX‖, X being the inputs of a Linear in the original model and
// X̂ those where it is deployed: on the calibration tokens, and on sequences behind them that took no part. α = 0 solves
// for deployed inputs. Dense inputs know no X̂, and their errors are of another kind.
import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { basename, join } from 'node:path'
import { parseArgs } from 'node:util'

import { compensate, type CompensationReport, compress, type CompressOptions, type EoraOptions, loadModel } from 'kintsugi'

const { values: given } = parseArgs({
  options: {
    checkpoint: { type: 'string' },
    text: { type: 'string' },
    calibration: { type: 'string' },
    methods: { type: 'string', default: 'gptq,rtn' },
    bits: { type: 'string', default: '2,3' },
    rank: { type: 'string', default: '16' },
    shares: { type: 'string', default: '0,0.25,0.5,1' },
    sequences: { type: 'string', default: '32' },
    length: { type: 'string', default: '256' },
    characters: { type: 'string', default: '1e9' },
    subset: { type: 'boolean', default: false },
  },
})
if (!given.checkpoint || !given.text || !given.calibration) {
  throw new Error('--checkpoint, --text and --calibration are needed')
}
const text = (await readFile(given.text, 'utf8')).slice(0, Number(given.characters))
const [rank, length] = [Number(given.rank), Number(given.length)]
const calibration = { file: given.calibration, sequences: Number(given.sequences), length, subset: given.subset }
const numbers = (list: string): number[] => list.split(',').map(Number)
const scratch = await mkdtemp(join(tmpdir(), 'kintsugi-inputs-'))
let outputs = 0
const fresh = (): string => join(scratch, String(outputs++))

async function perplexity(folder: string, compensation?: string): Promise<string> {
  using model = await loadModel(folder, { ...(compensation !== undefined && { compensation }) })
  return (await model.perplexity(text, { length })).perplexity.toFixed(3)
}

function mean(values: (number | undefined)[]): string {
  const known = values.filter((value) => value !== undefined)
  return known.length === 0 ? '' : `${((100 * known.reduce((a, b) => a + b, 0)) / known.length).toFixed(2)} %`
}

const row = (...cells: (string | number)[]): void => console.log(`| ${cells.join(' | ')} |`)
row('model', 'base', 'bits', 'inputs', 'perplexity', 'error', 'held out')
row('---', '---', '---', '---', '---', '---', '---')
for (const checkpoint of given.checkpoint.split(',')) {
  const model = basename(checkpoint)
  row(model, '', 16, 'uncompressed', await perplexity(checkpoint), '', '')
  for (const method of given.methods.split(',') as NonNullable<CompressOptions['method']>[]) {
    for (const bits of numbers(given.bits) as NonNullable<CompressOptions['bits']>[]) {
      const base = fresh()
      await compress(checkpoint, { out: base, method, bits, groupSize: 64, calibration })
      const solve = async (inputs: Partial<EoraOptions>): Promise<[string, CompensationReport]> => {
        const out = fresh()
        return [out, await compensate(checkpoint, base, { out, calibration, eora: { rank, ...inputs } })]
      }
      row(model, method, bits, 'no compensation', await perplexity(base), '', '')
      for (const mismatch of numbers(given.shares)) {
        const [out, { linears }] = await solve({ inputs: 'mixed', mismatch })
        const errors = linears.map(({ denseError }) => denseError ?? undefined)
        const seen = mean(errors.map((error) => error?.compensated))
        const held = mean(errors.map((error) => error?.holdOut?.compensated))
        row(model, method, bits, mismatch === 0 ? 'deployed' : `mixed, α ${mismatch}`, await perplexity(base, out), seen, held)
      }
      row(model, method, bits, 'dense', await perplexity(base, (await solve({ inputs: 'dense' }))[0]), '', '')
    }
  }
}
await rm(scratch, { recursive: true })
