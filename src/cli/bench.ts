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

const BAR_WIDTH = 20
const EIGHTHS = ['', '▏', '▎', '▍', '▌', '▋', '▊', '▉']

/** `kintsugi bench` */
export function registerBench(program: Command): void {
  program
    .command('bench')
    .description('how fast this machine reads and multiplies, and what products reach of that')
    .option('--seconds <n>', 'time that measuring may take', numberArgument, 12)
    .option('--threads <n>', 'number of threads beside one (default: all)', numberArgument)
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
  const { cpu, cpuLevel, threads, outFeatures, inFeatures, cacheBytes, workingSetBytes } = report
  const pairs = formatPairs(
    [
      ['CPU', `${cpu ? `${cpu}, ` : ''}level ${cpuLevel}, ${threadCount(Math.max(...threads))}`],
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
      { title: 'a loop of' },
    ],
    ceilings.map(({ kind, threads, rate, instructions }) => {
      const unit = kind === 'memory' ? 'GB/s' : 'GOP/s'
      return [kind, String(threads), `${digits(rate.median / 1e9)} ${unit}`, range(rate, 1e-9), instructions]
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
      { title: 'rate', align: 'right' },
      { title: 'of the ceiling' },
    ],
    products.map((product) => {
      const { threads, seconds, bytesPerSecond, operationsPerSecond, limit, share, arithmetic } = product
      const rate = rows === 1 ? `${digits(bytesPerSecond / 1e9)} GB/s` : `${digits(operationsPerSecond / 1e9)} GOP/s`
      const ceiling = limit === 'memory' ? 'memory' : arithmetic
      const shown = `${bar(share)} ${String(Math.round(100 * share)).padStart(3)} % ${ceiling}`
      return [weightsName(product), String(threads), digits(seconds.median * 1e3), range(seconds, 1e3), rate, shown]
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

function range({ low, high }: Spread, scale: number): string {
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
