import type { Command } from 'commander'

import {
  type CeilingSpeed,
  type MeasuredWeights,
  measureSpeed,
  type ProductSpeed,
  type SpeedReport,
  type Spread,
} from '../index.js'
import { numberArgument, numbersArgument, withoutUndefined } from './arguments.js'
import { formatBytes, formatSeconds } from './format.js'
import { runCommand } from './run-command.js'
import { formatPairs, formatTable } from './table.js'
import { colorsFor } from './terminal.js'

interface BenchArguments {
  seconds: number
  threads?: number
  rows: number[]
  json?: boolean
}

/** Rounds from which on a tenth of them says something. */
const LEAST_ROUNDS = 5

const BAR_WIDTH = 20
const EIGHTHS = ['', '▏', '▎', '▍', '▌', '▋', '▊', '▉']

/** `kintsugi bench` */
export function registerBench(program: Command): void {
  program
    .command('bench')
    .description('how fast this machine reads and multiplies, and what products reach of that')
    .option('--seconds <n>', 'time that measuring may take', numberArgument, 12)
    .option('--threads <n>', 'number of threads to compare with one (default: all)', numberArgument)
    .option('--rows <list>', 'rows of x of the products, such as 1,8,512', numbersArgument, [1, 8, 512])
    .option('--json', 'print one JSON document')
    .action((given: BenchArguments) =>
      runCommand(given.json, async ({ signal, follow }) => {
        const { json: _, ...options } = given
        const report = await follow(measureSpeed({ ...withoutUndefined(options), signal }), 'bench')
        return { document: report, text: describe(report) }
      }),
    )
}

function describe(report: SpeedReport): string {
  const { cpuName, cpuLevel, threads, outFeatures, inFeatures, cacheBytes, workingSetBytes } = report
  const pairs = formatPairs(
    [
      ['CPU', `${cpuName ? `${cpuName}, ` : ''}level ${cpuLevel}, ${threadCount(Math.max(...threads))}`],
      [
        'matrices',
        `${outFeatures}×${inFeatures}, ${formatBytes(workingSetBytes)} of each kind in turn` +
          (cacheBytes === null ? '' : `; the last cache has ${formatBytes(cacheBytes)}`),
      ],
      ['time', formatSeconds(report.seconds)],
    ],
    process.stdout,
  )
  const rows = [...new Set(report.products.map((product) => product.rows))]
  const tables = rows.map((count) => productTable(report.products.filter((product) => product.rows === count)))
  return [pairs, ceilingTable(report.ceilings), ...tables, modelTable(report)].filter(Boolean).join('\n\n')
}

function ceilingTable(ceilings: readonly CeilingSpeed[]): string {
  return formatTable(
    [
      { title: 'ceiling' },
      { title: 'threads', align: 'right' },
      { title: 'rate', align: 'right' },
      { title: '10–90 %', align: 'right' },
      { title: 'rounds', align: 'right' },
      { title: 'a loop of' },
    ],
    ceilings.map(({ kind, threads, rounds, rate, instructions }) => {
      const shown = `${digits(rate.median / 1e9)} ${kind === 'memory' ? 'GB/s' : 'GOP/s'}`
      return [kind, String(threads), shown, range(rate, 1e-9, rounds), String(rounds), instructions]
    }),
    process.stdout,
  )
}

/** Products of one number of rows. */
function productTable(products: readonly ProductSpeed[]): string {
  const rows = products[0]!.rows
  return formatTable(
    [
      { title: rows === 1 ? '1 row' : `${rows} rows` },
      { title: 'threads', align: 'right' },
      { title: 'ms', align: 'right' },
      { title: '10–90 %', align: 'right' },
      { title: 'rounds', align: 'right' },
      { title: 'rate', align: 'right' },
      { title: 'of the ceiling' },
    ],
    products.map((product) => {
      const { threads, rounds, seconds, bytesPerSecond, operationsPerSecond, limit, share, arithmetic } = product
      const rate = rows === 1 ? `${digits(bytesPerSecond / 1e9)} GB/s` : `${digits(operationsPerSecond / 1e9)} GOP/s`
      const ceiling = limit === 'memory' ? 'memory' : arithmetic
      const shown = `${bar(share)} ${String(Math.round(100 * share)).padStart(3)} % ${ceiling}`
      const times = [digits(seconds.median * 1e3), range(seconds, 1e3, rounds), String(rounds)]
      return [weightsName(product), String(threads), ...times, rate, shown]
    }),
    process.stdout,
  )
}

/** Tokens per second on all threads; empty when one row was not measured. */
function modelTable({ models, threads }: SpeedReport): string {
  const shown = models.filter((model) => model.threads === Math.max(...threads))
  if (shown.length === 0) return ''
  const sizes = [...new Set(shown.map(({ parameters }) => parameters))]
  const kinds = [...new Set(shown.map(weightsName))]
  return formatTable(
    [
      { title: 'tokens/s at most' },
      ...sizes.map((parameters) => ({ title: `${parameters / 1e9}B`, align: 'right' as const })),
    ],
    kinds.map((kind) => {
      const speeds = shown.filter((model) => weightsName(model) === kind)
      return [kind, ...speeds.map(({ tokensPerSecond }) => digits(tokensPerSecond))]
    }),
    process.stdout,
  )
}

/** `int4 g128 fast r=64` */
function weightsName({ weights, groupSize, rank, precision }: MeasuredWeights): string {
  return `${weights}${groupSize === null ? '' : ` g${groupSize}`} ${precision}${rank > 0 ? ` r=${rank}` : ''}`
}

/** A bar for a share of one, in eighths of a character. */
function bar(share: number): string {
  const colors = colorsFor(process.stdout)
  const eighths = Math.round(Math.min(share, 1) * BAR_WIDTH * 8)
  const filled = '█'.repeat(Math.floor(eighths / 8)) + EIGHTHS[eighths % 8]!
  return colors.yellow(filled) + colors.dim('·'.repeat(BAR_WIDTH - filled.length))
}

/** A dash where there were too few rounds for a range. */
function range({ low, high }: Spread, scale: number, rounds: number): string {
  if (rounds < LEAST_ROUNDS) return '–'
  return `${digits(low * scale)}–${digits(high * scale)}`
}

/** Three digits. */
function digits(value: number): string {
  if (value >= 99.95) return value.toFixed(0)
  if (value >= 9.995) return value.toFixed(1)
  return value.toFixed(value >= 0.9995 ? 2 : 3)
}

function threadCount(threads: number): string {
  return threads === 1 ? '1 thread' : `${threads} threads`
}
