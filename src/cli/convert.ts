import type { Command } from 'commander'

import { type ConversionReport, convert, type ConvertOptions } from '../index.js'
import { groupSizeArgument, numberArgument } from './arguments.js'
import { formatBytes, formatSeconds, formatShare } from './format.js'
import { runCommand } from './run-command.js'
import { formatPairs, formatTable } from './table.js'

interface ConvertArguments {
  out: string
  format: ConvertOptions['format']
  allowRequantize: boolean
  bits?: NonNullable<ConvertOptions['bits']>
  groupSize?: number | 'whole'
  dryRun: boolean
  json?: boolean
}

const LARGEST_ERRORS_SHOWN = 5

/** `kintsugi convert CHECKPOINT -o OUT --format NAME` */
export function registerConvert(program: Command): void {
  program
    .command('convert')
    .description('write the quantized Linears of a checkpoint in another format, exactly where the format holds them')
    .argument('<checkpoint>', 'folder of the checkpoint, or GGUF file')
    .requiredOption('-o, --out <folder>', 'folder to write, or GGUF file; must not exist, or be empty')
    .requiredOption(
      '--format <name>',
      'compressed-tensors/pack-quantized, gptq, gptq_v2, awq; f32, f16, bf16 to widen them; gguf:Q4_0, gguf:Q8_0 …',
    )
    .option('--allow-requantize', 'round Linears anew whose grid the format does not hold', false)
    .option('--bits <n>', 'width of a code of Linears that are rounded anew', numberArgument)
    .option('--group-size <n>', "inputs that share a scale there, or 'whole'", groupSizeArgument)
    .option('--dry-run', 'measure what it would cost; write nothing', false)
    .option('--json', 'print one JSON document')
    .action((checkpoint: string, given: ConvertArguments) =>
      runCommand(given.json, async ({ signal, follow }) => {
        const { json: _, ...options } = given
        const report = await follow(convert(checkpoint, { ...options, signal }), 'convert')
        return { document: report, text: describe(report) }
      }),
    )
}

function describe(report: ConversionReport): string {
  const { recipe, linears } = report
  const inexact = linears.filter(({ exact }) => !exact).sort((a, b) => b.error - a.error)
  const pairs = formatPairs(
    [
      ['written', recipe.dryRun ? 'nothing (dry run)' : recipe.out],
      ['format', `${report.sourceFormat} → ${report.format}`],
      ['Linears', `${linears.length}, ${linears.length - inexact.length} of them exact`],
      ['size', recipe.dryRun ? undefined : `${formatBytes(report.sourceBytes)} → ${formatBytes(report.bytes)}`],
      ['notice', report.notices.join('; ') || undefined],
      ['time', formatSeconds(report.seconds)],
    ],
    process.stdout,
  )
  if (inexact.length === 0) return pairs
  const table = formatTable(
    [{ title: 'largest changes' }, { title: 'bits', align: 'right' }, { title: 'of the weights', align: 'right' }],
    inexact.slice(0, LARGEST_ERRORS_SHOWN).map(({ name, bits, error }) => [name, String(bits), formatShare(error)]),
    process.stdout,
  )
  return `${pairs}\n\n${table}`
}
