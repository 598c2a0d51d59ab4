import type { Command } from 'commander'

import { Checkpoint, loadModel, type PerplexityReport } from '../index.js'
import { type ModelArguments, numberArgument, readText, withModelOptions } from './arguments.js'
import { formatSeconds, formatShare } from './format.js'
import { type CommandContext, runCommand } from './run-command.js'
import { formatPairs } from './table.js'

interface EvalArguments extends ModelArguments {
  text: string
  length: number
  adapter?: string
  reference?: string
  compensation: boolean
  json?: boolean
}

/** The measurement of one checkpoint. */
interface Measurement extends PerplexityReport {
  checkpoint: string
  bitsPerWeight: number | null
}

/** `kintsugi eval CHECKPOINT --text FILE` */
export function registerEval(program: Command): void {
  const command = program
    .command('eval')
    .description('perplexity of a text: how well the model predicts it')
    .argument('<checkpoint>', 'folder of the checkpoint, compressed or not')
    .requiredOption('--text <file>', 'UTF-8 text')
    .option('--length <n>', 'tokens of a window', numberArgument, 512)
    .option('--adapter <folder>', 'PEFT adapter to apply')
    .option('--reference <checkpoint>', 'measure this one too, and compare')
    .option('--no-compensation', 'leave out the compensation of a compressed checkpoint')
    .option('--json', 'print one JSON document')
  withModelOptions(command).action((checkpoint: string, options: EvalArguments) =>
    runCommand(options.json, async (context) => {
      const text = await readText(options.text)
      const measured = await measure(context, checkpoint, text, options, options.adapter)
      const reference =
        options.reference === undefined ? undefined : await measure(context, options.reference, text, options)
      const document = { ...measured, text: options.text, ...(reference && { reference }) }
      return { document, text: describe(measured, reference) }
    }),
  )
}

async function measure(
  { signal, follow }: CommandContext,
  checkpoint: string,
  text: string,
  { precision, backend, compensation, length }: EvalArguments,
  adapter?: string,
): Promise<Measurement> {
  const adapters: Record<string, string> = adapter === undefined ? {} : { adapter }
  const source = await Checkpoint.open(checkpoint)
  const loading = loadModel(source, { precision, backend, compensation, adapters, signal })
  using model = await follow(loading, 'load')
  const job = model.perplexity(text, { length, signal, ...(adapter !== undefined && { adapter: 'adapter' }) })
  return { checkpoint, bitsPerWeight: source.info.bitsPerWeight, ...(await follow(job, 'evaluate')) }
}

function describe(measured: Measurement, reference: Measurement | undefined): string {
  const increase = reference && measured.perplexity / reference.perplexity - 1
  return formatPairs(
    [
      ['perplexity', measured.perplexity.toFixed(4)],
      ['of the reference', reference?.perplexity.toFixed(4)],
      ['increase', increase === undefined ? undefined : formatShare(increase)],
      ['negative log-likelihood', `${measured.meanNegativeLogLikelihood.toFixed(6)} nats per token`],
      ['tokens', `${measured.tokens} in ${measured.windows} windows of ${measured.length}`],
      ['bits per weight', measured.bitsPerWeight?.toFixed(2)],
      ['time', formatSeconds(measured.secondsTotal)],
    ],
    process.stdout,
  )
}
