import type { Command } from 'commander'

import {
  compensate,
  type CompensateOptions,
  type CompensationPlan,
  type CompensationReport,
  KintsugiError,
} from '../index.js'
import {
  bytesArgument,
  type CalibrationArguments,
  calibrationArguments,
  type EoraArguments,
  eoraArguments,
  type ModelArguments,
  withCalibrationOptions,
  withEoraOptions,
  withModelOptions,
  withoutUndefined,
} from './arguments.js'
import { describeCalibration, describeCompensation, describeLargestErrors, describePhases } from './describe-job.js'
import { formatBytes, formatSeconds, formatShare } from './format.js'
import { runCommand } from './run-command.js'
import { formatPairs } from './table.js'

interface CompensateArguments extends Omit<ModelArguments, 'precision'>, CalibrationArguments, EoraArguments {
  precision: NonNullable<CompensateOptions['precision']>
  out: string
  memory?: number
  fresh: boolean
  dryRun: boolean
  json?: boolean
}

/** Exit code of a job with a certificate that does not hold. */
const EXIT_UNCERTIFIED = 3

/** `kintsugi compensate ORIGINAL COMPRESSED -o ADAPTER` */
export function registerCompensate(program: Command): void {
  const command = program
    .command('compensate')
    .description('repair a checkpoint that is compressed already by a low-rank adapter (EoRA), in a PEFT folder')
    .argument('<original>', 'folder of the checkpoint before compression')
    .argument('<compressed>', 'folder or GGUF file of what became of it: quantized, pruned, by whomever')
    .requiredOption('-o, --out <folder>', 'PEFT folder to write; must not exist, or be empty')
    .option('--memory <size>', 'memory that the job may take, such as 6G; default: what is available', bytesArgument)
    .option('--fresh', 'discard what an interrupted job left instead of going on with it', false)
    .option('--dry-run', 'check everything and print the plan; write nothing', false)
    .option('--json', 'print one JSON document')
    .addHelpText(
      'after',
      `\nThe exit code is ${EXIT_UNCERTIFIED} when a certificate does not hold: the factors are not the best of their rank.`,
    )
  withEoraOptions(command)
  withCalibrationOptions(command)
  withModelOptions(command, 'f32 or exact').action(
    (original: string, compressed: string, given: CompensateArguments) =>
      runCommand(given.json, async ({ signal, follow }) => {
        const { out, memory, precision, backend, fresh, dryRun } = given
        const calibration = calibrationArguments(given)
        if (calibration === undefined) {
          throw new KintsugiError({
            code: 'ERR_OPTION_INVALID',
            message: 'a compensation needs calibration',
            subject: '--calibration',
            hint: 'Give a text that resembles what the model will read, or saved statistics.',
          })
        }
        // The library says what is missing.
        const eora = eoraArguments(given) ?? {}
        const options = withoutUndefined({ out, calibration, eora, memory, precision, backend, fresh, signal })
        if (dryRun) {
          const plan = await compensate(original, compressed, { ...options, dryRun: true })
          return { document: plan, text: describePlan(plan) }
        }
        const report = await follow(compensate(original, compressed, { ...options, dryRun: false }), 'compensate')
        const failed = (report.summary.compensation?.uncertified ?? 0) > 0
        return { document: report, text: describeReport(report), exitCode: failed ? EXIT_UNCERTIFIED : 0 }
      }),
  )
}

function describePlan(plan: CompensationPlan): string {
  return formatPairs(
    [
      ['architecture', plan.architecture],
      ['Linears', String(plan.linears.length)],
      ['factors', `at most ${formatBytes(plan.bytes)}`],
      ['working memory', `about ${formatBytes(plan.memory.peakBytes)} of ${formatBytes(plan.memory.budgetBytes)}`],
      ['disk space', `about ${formatBytes(plan.disk.neededBytes)}`],
      ['output', `${plan.recipe.out} (nothing was written)`],
    ],
    process.stdout,
  )
}

function describeReport({ recipe, summary, linears }: CompensationReport): string {
  const error = summary.meanError
  const pairs = formatPairs(
    [
      ['written', recipe.out],
      ['factors', `${formatBytes(summary.bytes)}, ${summary.bitsPerWeight.toFixed(2)} bits per weight`],
      ['mean output error', error ? `${formatShare(error.quantized)} → ${formatShare(error.compensated)}` : undefined],
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
