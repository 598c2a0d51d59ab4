import type { Command } from 'commander'

import {
  Checkpoint,
  type DivergenceReport,
  loadModel,
  type Model,
  type PerplexityOptions,
  type PerplexityReport,
} from '../index.js'
import { type ModelArguments, numberArgument, readText, withModelOptions, withoutUndefined } from './arguments.js'
import { formatSeconds, formatShare } from './format.js'
import { type CommandContext, runCommand } from './run-command.js'
import { formatPairs } from './table.js'

interface EvalArguments extends ModelArguments {
  text: string
  length: number
  adapter?: string
  reference?: string
  compensation?: string | boolean
  eoraRank?: number
  json?: boolean
}

/** The measurement of one checkpoint. */
interface Measurement extends PerplexityReport {
  checkpoint: string
  bitsPerWeight: number | null
}

/** What a comparison adds to the measurement. */
interface Comparison {
  reference: { checkpoint: string; bitsPerWeight: number | null; perplexity: number }
  divergence: Pick<DivergenceReport, 'meanKlDivergence' | 'p99KlDivergence' | 'top1Agreement'>
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
    .option('--reference <checkpoint>', 'the original: measure it too, and how far the predictions are from its own')
    .option('--compensation <folder>', 'factors to use beside those that the checkpoint has in eora/')
    .option('--no-compensation', 'leave out the compensation of a compressed checkpoint')
    .option('--eora-rank <n>', 'of each compensation no more than this many directions', numberArgument)
    .option('--json', 'print one JSON document')
  withModelOptions(command).action((checkpoint: string, options: EvalArguments) =>
    runCommand(options.json, async (context) => {
      const text = await readText(options.text)
      const [model, bitsPerWeight] = await load(context, checkpoint, options, options.adapter)
      using _ = model
      const measured = { checkpoint, bitsPerWeight, text: options.text }
      if (options.reference === undefined) {
        const report = await context.follow(model.perplexity(text, request(context, options)), 'evaluate')
        const document = { ...measured, ...report }
        return { document, text: describe(document) }
      }
      const { compensation: _compensation, eoraRank: _rank, ...plain } = options
      const [reference, bitsOfReference] = await load(context, options.reference, plain)
      using __ = reference
      const job = model.divergence(reference, text, request(context, options))
      const { meanKlDivergence, p99KlDivergence, top1Agreement, referencePerplexity, ...report } =
        await context.follow(job, 'compare')
      const document = {
        ...measured,
        ...report,
        meanNegativeLogLikelihood: Math.log(report.perplexity),
        reference: {
          checkpoint: options.reference,
          bitsPerWeight: bitsOfReference,
          perplexity: referencePerplexity,
        },
        divergence: { meanKlDivergence, p99KlDivergence, top1Agreement },
      }
      return { document, text: describe(document, document) }
    }),
  )
}

async function load(
  { signal, follow }: CommandContext,
  checkpoint: string,
  { precision, backend, compensation, eoraRank }: EvalArguments,
  adapter?: string,
): Promise<[Model, number | null]> {
  const adapters: Record<string, string> = adapter === undefined ? {} : { adapter }
  const source = await Checkpoint.open(checkpoint)
  const options = withoutUndefined({ precision, backend, compensation, eoraRank, adapters, signal })
  const loading = loadModel(source, options)
  // What the folder says counts its whole compensation, and no other.
  const known = compensation === undefined && eoraRank === undefined
  return [await follow(loading, 'load'), known ? source.info.bitsPerWeight : null]
}

function request({ signal }: CommandContext, { length, adapter }: EvalArguments): PerplexityOptions {
  return { length, signal, ...(adapter !== undefined && { adapter: 'adapter' }) }
}

function describe(measured: Measurement, comparison?: Comparison): string {
  const reference = comparison?.reference.perplexity
  const divergence = comparison?.divergence
  return formatPairs(
    [
      ['perplexity', measured.perplexity.toFixed(4)],
      ['of the reference', reference?.toFixed(4)],
      ['increase', reference === undefined ? undefined : formatShare(measured.perplexity / reference - 1)],
      ['KL divergence', divergence && `${divergence.meanKlDivergence.toFixed(5)} nats per token`],
      ['99 % of tokens below', divergence && `${divergence.p99KlDivergence.toFixed(5)} nats`],
      ['same likeliest token', divergence && formatShare(divergence.top1Agreement)],
      ['negative log-likelihood', `${measured.meanNegativeLogLikelihood.toFixed(6)} nats per token`],
      ['tokens', `${measured.tokens} in ${measured.windows} windows of ${measured.length}`],
      ['bits per weight', measured.bitsPerWeight?.toFixed(2)],
      ['time', formatSeconds(measured.secondsTotal)],
    ],
    process.stdout,
  )
}
