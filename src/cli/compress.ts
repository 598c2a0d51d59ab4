import type { Command } from 'commander'

import {
  compress,
  type CompressedLinear,
  type CompressOptions,
  type CompressReport,
  type LinearOverride,
  type Plan,
} from '../index.js'
import {
  bytesArgument,
  type CalibrationArguments,
  calibrationArguments,
  type EoraArguments,
  eoraArguments,
  groupSizeArgument,
  type ModelArguments,
  numberArgument,
  overrideArgument,
  withCalibrationOptions,
  withEoraOptions,
  withModelOptions,
  withoutUndefined,
} from './arguments.js'
import { describeCalibration, describeCompensation, describeLargestErrors, describePhases } from './describe-job.js'
import { formatBytes, formatCount, formatSeconds, formatShare } from './format.js'
import { runCommand } from './run-command.js'
import { formatPairs, formatTable } from './table.js'

interface CompressArguments extends Omit<ModelArguments, 'precision'>, CalibrationArguments, PrefixedEoraArguments {
  precision: NonNullable<CompressOptions['precision']>
  out: string
  method: NonNullable<CompressOptions['method']>
  rounding: NonNullable<CompressOptions['rounding']>
  bits?: NonNullable<CompressOptions['bits']>
  bitBudget?: number
  groupSize?: number | 'whole'
  groupAxis: NonNullable<CompressOptions['groupAxis']>
  override?: LinearOverride[]
  format: NonNullable<CompressOptions['format']>
  symmetric?: boolean
  clip?: boolean
  scaleType?: NonNullable<CompressOptions['scaleType']>
  actOrder: boolean
  staticGroups: boolean
  damping: number
  saveCalibration?: string
  memory?: number
  fresh: boolean
  dryRun: boolean
  json?: boolean
}

/** The options of a compensation as this command names them: `--eora-rank` and so on. */
type PrefixedEoraArguments = { [K in keyof EoraArguments as `eora${Capitalize<K>}`]: EoraArguments[K] }

/** `kintsugi compress CHECKPOINT -o OUT` */
export function registerCompress(program: Command): void {
  const command = program
    .command('compress')
    .description('compress a checkpoint, with or without a low-rank compensation, into a Hugging Face folder or GGUF')
    .argument('<checkpoint>', 'folder of the checkpoint')
    .requiredOption('-o, --out <folder>', 'folder to write; must not exist, or be empty')
    .option('--method <name>', 'gptq, awq or rtn', 'gptq')
    .option('--rounding <name>', 'AWQ: what rounds the scaled weights, rtn or gptq', 'rtn')
    .option('--bits <n>', '2, 3, 4, 5, 6 or 8 (default: 4)', numberArgument)
    .option('--bit-budget <n>', 'in place of --bits: bits per weight, divided where they do most good', numberArgument)
    .option('--group-size <n>', "weights that share a scale, or 'whole' (default: 128)", groupSizeArgument)
    .option('--group-axis <axis>', 'which way they lie: input, output, or adaptive for the better one (AdaDim)', 'input')
    .option(
      '--override <linears=bits[:group]>',
      "other bits or groups for some Linears, e.g. '*.down_proj=8:64'; may be repeated",
      overrideArgument,
    )
    .option(
      '--format <name>',
      'auto, compressed-tensors/pack-quantized, gptq, gptq_v2, awq, kintsugi; gguf:Q4_0 or gguf:Q8_0 (in groups of 32)',
      'auto',
    )
    .option('--symmetric', 'grids around zero, without zero points')
    .option('--scale-type <name>', 'auto, bf16, f16 or f32 (default: auto)')
    .option('--clip', 'shrink the range of a group where that lowers its error; AWQ does')
    .option('--no-clip', 'AWQ: keep every range')
    .option('--no-act-order', 'GPTQ: keep the order of the columns')
    .option('--no-static-groups', 'GPTQ: scales from the corrected weights')
    .option('--damping <share>', 'GPTQ: share of the mean diagonal that is added', numberArgument, 0.01)
    .option('--save-calibration <file>', 'save the statistics for other jobs (safetensors)')
    .option('--memory <size>', 'memory that the job may take, such as 6G; default: what is available', bytesArgument)
    .option('--fresh', 'discard what an interrupted job left instead of going on with it', false)
    .option('--dry-run', 'check everything and print the plan; write nothing', false)
    .option('--json', 'print one JSON document')
  withCalibrationOptions(command, '; GPTQ, AWQ and EoRA need it')
  withEoraOptions(command, 'eora-')
  withModelOptions(command, 'f32 or exact').action((checkpoint: string, given: CompressArguments) =>
    runCommand(given.json, async ({ signal, follow }) => {
      const { out, method, rounding, bits, bitBudget, groupSize, groupAxis, override, format, symmetric } = given
      const { clip, scaleType, actOrder, staticGroups, damping, saveCalibration, memory, fresh, dryRun } = given
      const { precision, backend } = given
      const options: CompressOptions = {
        ...{ out, method, rounding, groupAxis, format, actOrder, staticGroups, damping },
        ...{ fresh, precision, backend, signal },
        ...withoutUndefined({
          bits,
          bitBudget,
          groupSize,
          symmetric,
          scaleType,
          overrides: override,
          clip,
          calibration: calibrationArguments(given),
          saveStatistics: saveCalibration,
          memory,
          eora: eoraArguments({
            rank: given.eoraRank,
            solver: given.eoraSolver,
            factorBits: given.eoraFactorBits,
            inputs: given.eoraInputs,
            mismatch: given.eoraMismatch,
            affine: given.eoraAffine,
            grouped: given.eoraGrouped,
            meanRank: given.eoraMeanRank,
            budget: given.eoraBudget,
            minRank: given.eoraMinRank,
            rankMultiple: given.eoraRankMultiple,
            rankWeights: given.eoraRankWeights,
          }),
        }),
      }
      if (dryRun) {
        const plan = await compress(checkpoint, { ...options, dryRun: true })
        return { document: plan, text: describePlan(plan) }
      }
      const report = await follow(compress(checkpoint, { ...options, dryRun: false }), 'compress')
      return { document: report, text: describeReport(report) }
    }),
  )
}

function describePlan(plan: Plan): string {
  const shapes = new Map<string, { count: number; storedBits: number; weights: number; rank: number }>()
  for (const { name, rows, columns, rank, storedBits } of plan.linears) {
    const shape = `${name.split('.').at(-1)} ${rows} × ${columns}`
    const known = shapes.get(shape) ?? { count: 0, storedBits: 0, weights: 0, rank }
    known.count++
    known.storedBits += storedBits
    known.weights += rows * columns
    shapes.set(shape, known)
  }
  const pairs = formatPairs(
    [
      ['architecture', plan.architecture],
      ['format', plan.format],
      ['weights to quantize', formatCount(plan.quantizedWeights)],
      ['bits per weight', plan.bitsPerWeight.toFixed(2)],
      ['size', `${formatBytes(plan.sourceBytes)} → ${formatBytes(plan.bytes)}`],
      ['working memory', describeMemory(plan)],
      ['disk space', `about ${formatBytes(plan.disk.neededBytes + plan.disk.statisticsBytes)}`],
      ['output', `${plan.recipe.out} (nothing was written)`],
    ],
    process.stdout,
  )
  const table = formatTable(
    [
      { title: 'Linears' },
      { title: 'count', align: 'right' },
      { title: 'rank', align: 'right' },
      { title: 'bits per weight', align: 'right' },
    ],
    [...shapes].map(([shape, { count, rank, storedBits, weights }]) => [
      shape,
      String(count),
      String(rank),
      (storedBits / weights).toFixed(2),
    ]),
    process.stdout,
  )
  return `${pairs}\n\n${table}`
}

function describeMemory({ memory }: Plan): string {
  const ways = [
    ...(memory.activationsOnDisk ? ['activations on disk'] : []),
    ...(memory.passes > 1 ? [`statistics in ${memory.passes} passes`] : []),
  ]
  const how = ways.length > 0 ? `, ${ways.join(', ')}` : ''
  return `about ${formatBytes(memory.peakBytes)} of ${formatBytes(memory.budgetBytes)}${how}`
}

/** How many Linears have each value: `2 bits 8 ×, 4 bits 20 ×`. */
function describeCounts(linears: CompressedLinear[], of: (linear: CompressedLinear) => string): string {
  const counts = new Map<string, number>()
  for (const linear of linears) counts.set(of(linear), (counts.get(of(linear)) ?? 0) + 1)
  return [...counts].sort(([a], [b]) => a.localeCompare(b)).map(([value, count]) => `${value} ${count} ×`).join(', ')
}

function describeReport(report: CompressReport): string {
  const { recipe, summary, linears } = report
  const error = summary.meanError
  const compensated = recipe.eora && error ? ` → ${formatShare(error.compensated)} with factors` : ''
  const pairs = formatPairs(
    [
      ['written', `${recipe.out} (${summary.format})`],
      ['notice', summary.notices.join('; ') || undefined],
      ['size', `${formatBytes(summary.sourceBytes)} → ${formatBytes(summary.bytes)}`],
      ['bits per weight', summary.bitsPerWeight.toFixed(2)],
      ['widths', recipe.bitBudget === null ? undefined : describeCounts(linears, ({ bits }) => `${bits} bits`)],
      ['group axes', recipe.groupAxis === 'adaptive' ? describeCounts(linears, (l) => l.groupAxis) : undefined],
      ['mean output error', error ? formatShare(error.quantized) + compensated : undefined],
      ...describeCalibration(summary.calibration),
      ...describeCompensation(summary.compensation),
      ['time', `${formatSeconds(summary.seconds)}${describePhases(summary.phases)}`],
      ['peak memory', summary.peakMemoryBytes === null ? undefined : formatBytes(summary.peakMemoryBytes)],
    ],
    process.stdout,
  )
  const table = describeLargestErrors(linears)
  return table === undefined ? pairs : `${pairs}\n\n${table}`
}
