// What a compensation is worth: perplexity by width, rank, solver and calibration text, as Markdown; beside it rows with
// factors of codes, one with divided ranks, and one that spends the bytes of the middle rank on a larger base. Rows are
// printed as they come; the last lines compare the errors of every Linear.
//
//   node --import=tsx bench/compensation-quality.ts --checkpoint DIR --text FILE --calibration FILE[,FILE…]
//     [--method gptq] [--bits 2,3,4] [--ranks 4,8,16,32,64] [--sequences 32] [--length 256] [--characters N]
//
// Ranks at or above half of the smallest side of a Linear are left out. `error` is the mean over the Linears of
// ‖(W−Ŵ−BA)X‖ / ‖WX‖. All solvers see the statistics of one job, so that a Linear is one problem to all of them; rows of
// codes and divided ranks take statistics of their own and measure on inputs that took no part, too.
import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { basename, join } from 'node:path'
import { parseArgs } from 'node:util'

import {
  type CalibrationOptions,
  compensate,
  type CompensationReport,
  compress,
  type CompressOptions,
  type EoraOptions,
  type EoraSolver,
  loadModel,
} from 'kintsugi'

const { values: given } = parseArgs({
  options: {
    checkpoint: { type: 'string' },
    text: { type: 'string' },
    calibration: { type: 'string' },
    method: { type: 'string', default: 'gptq' },
    bits: { type: 'string', default: '2,3,4' },
    ranks: { type: 'string', default: '4,8,16,32,64' },
    sequences: { type: 'string', default: '32' },
    length: { type: 'string', default: '256' },
    characters: { type: 'string', default: '1e9' },
  },
})
const { checkpoint, text: textFile } = given
if (!checkpoint || !textFile || !given.calibration) {
  throw new Error('--checkpoint, --text and --calibration are needed')
}
const [sequences, length] = [Number(given.sequences), Number(given.length)]
const text = (await readFile(textFile, 'utf8')).slice(0, Number(given.characters))
const scratch = await mkdtemp(join(tmpdir(), 'kintsugi-compensation-'))
const solvers: EoraSolver[] = ['fast', 'exact', 'diagonal', 'lorc']
const GROUP_SIZE = 64
let outputs = 0
const fresh = (): string => join(scratch, String(outputs++))

async function perplexity(folder: string, compensation?: string): Promise<number> {
  using model = await loadModel(folder, { ...(compensation !== undefined && { compensation }) })
  return (await model.perplexity(text, { length })).perplexity
}

const share = (value: number | undefined): string => (value === undefined ? '' : `${(100 * value).toFixed(2)} %`)
const row = (...cells: (string | number)[]): void => console.log(`| ${cells.join(' | ')} |`)

/** Errors that decide whether a solver is behind another, Linear by Linear. */
const errors = new Map<EoraSolver, number[]>()
let worse = 0

const calibrations = given.calibration.split(',')
const baseOf = async (calibration: CalibrationOptions, options: Partial<CompressOptions>): Promise<[string, number]> => {
  const out = fresh()
  const method = given.method as NonNullable<CompressOptions['method']>
  const report = await compress(checkpoint, { out, method, groupSize: GROUP_SIZE, calibration, ...options })
  return [out, report.summary.bitsPerWeight]
}

console.log(`\nUncompressed: ${(await perplexity(checkpoint)).toFixed(3)}\n`)
row('bits', 'calibration', 'solver', 'rank', 'bits per weight', 'perplexity', 'error', 'held out')
row('---', '---', '---', '---', '---', '---', '---', '---')
for (const file of calibrations) {
  const calibration = { file, sequences, length }
  const label = basename(file).replace(/\.\w+$/, '')
  for (const bits of given.bits.split(',').map(Number) as NonNullable<CompressOptions['bits']>[]) {
    const statistics = `${fresh()}.safetensors`
    const [base, baseBits] = await baseOf(calibration, { bits, saveStatistics: statistics })
    const solve = async (
      eora: EoraOptions,
      from: CalibrationOptions = calibration,
    ): Promise<[string, CompensationReport]> => {
      const out = fresh()
      return [out, await compensate(checkpoint, base, { out, calibration: from, eora })]
    }
    const ranks = given.ranks.split(',').map(Number)
    const smallest = await compensate(checkpoint, base, { out: fresh(), calibration, eora: { rank: 1 }, dryRun: true })
    const side = Math.min(...smallest.linears.map(({ rows, columns }) => Math.min(rows, columns)))
    const possible = ranks.filter((rank) => rank < side / 2)
    const middle = possible[Math.floor(possible.length / 2)]
    if (middle === undefined) throw new Error(`no rank is below half of ${side}, the smallest side of a Linear`)
    row(bits, label, 'none', 0, baseBits.toFixed(2), (await perplexity(base)).toFixed(3), '', '')
    let reached = 0
    for (const solver of solvers) {
      for (const rank of possible) {
        const [folder, report] = await solve({ rank, solver }, { file: statistics })
        const { summary } = report
        const found = await perplexity(base, folder)
        row(
          bits,
          label,
          solver,
          rank,
          (baseBits + summary.bitsPerWeight).toFixed(2),
          found.toFixed(3),
          share(summary.meanError?.compensated),
          '',
        )
        if (solver === 'fast' && rank === middle) reached = baseBits + summary.bitsPerWeight
        const list = errors.get(solver) ?? []
        for (const { error } of report.linears) {
          if (!error) continue
          list.push(error.compensated)
          if (error.compensated > error.quantized * (1 + 1e-9)) worse++
        }
        errors.set(solver, list)
      }
    }
    for (const [name, eora] of [
      ['fast, 8-bit factors', { rank: 2 * middle < side ? 2 * middle : middle, factorBits: 8 }],
      ['fast, 4-bit factors', { rank: 4 * middle < side ? 4 * middle : middle, factorBits: 4 }],
      ['fast, divided ranks', { meanRank: middle, rank: Math.min(4 * middle, side), rankMultiple: 4 }],
    ] as [string, EoraOptions][]) {
      const [folder, { summary }] = await solve(eora)
      const rank = eora.rank ?? `${middle} in the mean`
      const found = (await perplexity(base, folder)).toFixed(3)
      const allocation = summary.compensation?.allocation
      const note = allocation ? `${name} (${allocation.chosen})` : name
      const [error, held] = [summary.meanError?.compensated, summary.compensation?.holdOut?.compensated]
      row(bits, label, note, rank, (baseBits + summary.bitsPerWeight).toFixed(2), found, share(error), share(held))
    }
    const [larger, largerBits] = await baseOf(calibration, { bitBudget: Math.min(reached, 8.4) })
    const found = (await perplexity(larger)).toFixed(3)
    row(bits, label, `none, the bytes of rank ${middle} in the base`, 0, largerBits.toFixed(2), found, '', '')
  }
}
await rm(scratch, { recursive: true })

const of = (solver: EoraSolver): number[] => errors.get(solver)!
const behind = (a: EoraSolver, b: EoraSolver): number =>
  of(a).filter((error, i) => error > of(b)[i]! * (1 + 1e-3) + 1e-9).length
console.log(`
Of ${of('fast').length} solutions per solver: fast above exact by more than a thousandth ${behind('fast', 'exact')} times,
above diagonal ${behind('fast', 'diagonal')} times, above lorc ${behind('fast', 'lorc')} times;
diagonal above lorc ${behind('diagonal', 'lorc')} times; any solver above no compensation ${worse} times.`)
