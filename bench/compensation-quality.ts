// What a compensation is worth: perplexity by width, rank, solver and calibration text, as Markdown; beside it rows with
// factors of codes, one with divided ranks, and one that spends the bytes of the middle rank on a larger base. Rows are
// printed as they come; the last lines compare the errors of every Linear.
//
//   node --import=tsx bench/compensation-quality.ts --checkpoint DIR[,DIR…] --text FILE --calibration FILE[,FILE…]
//     [--method gptq] [--bits 2,3,4] [--ranks 4,8,16,32,64] [--sequences 32] [--length 256] [--characters N] [--own]
//     [--affine] [--grouped]
//
// `--affine` prints other rows: each rank of `fast` with and without a bias, all on inputs that took no part, too.
// `--grouped` prints other rows, too: each rank of `fast` with an A for every Linear, and with one for all of an input, of
// the largest rank that takes no more bytes; then both with the ranks of those bytes divided.
// `--own` calibrates on the rest of the evaluated file, too, a text of the same kind, and with `fast` alone on the very
// text that is evaluated: how much overlap flatters.
// Ranks at or above half of the smallest side of a Linear are left out. `error` is the mean over the Linears of
// ‖(W−Ŵ−BA)X‖ / ‖WX‖. All solvers see the statistics of one job, so that a Linear is one problem to all of them; rows of
// codes and divided ranks take statistics of their own and measure on inputs that took no part, too.
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
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
    own: { type: 'boolean', default: false },
    affine: { type: 'boolean', default: false },
    grouped: { type: 'boolean', default: false },
  },
})
const { checkpoint: checkpoints, text: textFile } = given
if (!checkpoints || !textFile || !given.calibration) {
  throw new Error('--checkpoint, --text and --calibration are needed')
}
const [sequences, length] = [Number(given.sequences), Number(given.length)]
const whole = await readFile(textFile, 'utf8')
const text = whole.slice(0, Number(given.characters))
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

interface Calibrated {
  label: string
  file: string
  solvers: EoraSolver[]
}

const nameOf = (file: string): string => basename(file).replace(/\.\w+$/, '')
const calibrations: Calibrated[] = given.calibration
  .split(',')
  .map((file) => ({ label: nameOf(file), file, solvers: [...solvers] }))
if (given.own) {
  const [rest, evaluated] = [join(scratch, 'rest.txt'), join(scratch, 'evaluated.txt')]
  await writeFile(rest, whole.slice(text.length))
  await writeFile(evaluated, text)
  calibrations.push({ label: `${nameOf(textFile)}, the rest`, file: rest, solvers: [...solvers] })
  calibrations.push({ label: `${nameOf(textFile)}, the evaluated part`, file: evaluated, solvers: ['fast'] })
}

/** Prints the table of a checkpoint, and what its errors say. */
async function table(checkpoint: string): Promise<void> {
  /** Errors that decide whether a solver is behind another, Linear by Linear. */
  const errors = new Map<EoraSolver, number[]>(solvers.map((solver) => [solver, []]))
  let worse = 0
  const baseOf = async (
    calibration: CalibrationOptions,
    options: Partial<CompressOptions>,
  ): Promise<[string, number]> => {
    const out = fresh()
    const method = given.method as NonNullable<CompressOptions['method']>
    const report = await compress(checkpoint, { out, method, groupSize: GROUP_SIZE, calibration, ...options })
    return [out, report.summary.bitsPerWeight]
  }
  console.log(`\n### ${nameOf(checkpoint)}\n\nUncompressed: ${(await perplexity(checkpoint)).toFixed(3)}\n`)
  row('bits', 'calibration', 'solver', 'rank', 'bits per weight', 'perplexity', 'error', 'held out')
  row('---', '---', '---', '---', '---', '---', '---', '---')
  for (const { label, file, solvers: used } of calibrations) {
    const calibration = { file, sequences, length }
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
      if (given.affine) {
        for (const eora of possible.flatMap((rank) => [{ rank }, { rank, affine: true }] as EoraOptions[])) {
          const [folder, { summary }] = await solve(eora)
          const found = (await perplexity(base, folder)).toFixed(3)
          const [error, held] = [summary.meanError?.compensated, summary.compensation?.holdOut?.compensated]
          const weight = (baseBits + summary.bitsPerWeight).toFixed(2)
          row(bits, label, eora.affine ? 'fast, affine' : 'fast', eora.rank!, weight, found, share(error), share(held))
        }
        continue
      }
      if (given.grouped) {
        const bytesOf = async (eora: EoraOptions): Promise<number> =>
          (await compensate(checkpoint, base, { out: fresh(), calibration, eora, dryRun: true })).bytes
        for (const rank of possible) {
          const budgetBytes = await bytesOf({ rank })
          let most = rank
          while ((await bytesOf({ rank: most + 1, grouped: true })) <= budgetBytes) most++
          const divided = { budgetBytes, rank: Math.min(4 * rank, side), rankMultiple: 4 }
          for (const [name, eora] of [
            ['fast', { rank }],
            ['fast, grouped', { rank: most, grouped: true }],
            ['fast, divided', divided],
            ['fast, grouped, divided', { ...divided, grouped: true }],
          ] as [string, EoraOptions][]) {
            const [folder, { summary }] = await solve(eora)
            const found = (await perplexity(base, folder)).toFixed(3)
            const chosen = summary.compensation?.allocation?.chosen
            const note = chosen === undefined ? name : `${name} (${chosen})`
            const shown = summary.compensation!.meanRank.toFixed(chosen === undefined ? 0 : 1)
            row(bits, label, note, shown, (baseBits + summary.bitsPerWeight).toFixed(2), found, '', '')
          }
        }
        continue
      }
      let reached = 0
      for (const solver of used) {
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
          for (const { error } of report.linears) {
            if (!error) continue
            if (used.length === solvers.length) errors.get(solver)!.push(error.compensated)
            if (error.compensated > error.quantized * (1 + 1e-9)) worse++
          }
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

  if (given.affine || given.grouped) return
  const behind = (a: EoraSolver, b: EoraSolver): number =>
    errors.get(a)!.filter((error, i) => error > errors.get(b)![i]! * (1 + 1e-3) + 1e-9).length
  const count = errors.get('fast')!.length
  const alike = errors.get('diagonal')!.filter((error, i) => error === errors.get('lorc')![i]).length
  console.log(`
Of ${count} solutions per solver: fast above exact by more than a thousandth ${behind('fast', 'exact')} times,
above diagonal ${behind('fast', 'diagonal')} times, above lorc ${behind('fast', 'lorc')} times; exact above diagonal
${behind('exact', 'diagonal')} times, above lorc ${behind('exact', 'lorc')} times; diagonal above lorc
${behind('diagonal', 'lorc')} times (${share(behind('diagonal', 'lorc') / count)}), the same ${alike} times, lorc above diagonal
${behind('lorc', 'diagonal')} times; any solver above no compensation ${worse} times.`)
}

for (const checkpoint of checkpoints.split(',')) await table(checkpoint)
await rm(scratch, { recursive: true })
