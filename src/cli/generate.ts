import type { Command } from 'commander'

import { type GenerateOptions, type GenerationSummary, loadModel } from '../index.js'
import { listArgument, type ModelArguments, numberArgument, withModelOptions, withoutUndefined } from './arguments.js'
import { runCommand } from './run-command.js'
import { colorsFor } from './terminal.js'

interface GenerateArguments
  extends ModelArguments,
    Required<Omit<GenerateOptions, 'seed' | 'adapter' | 'signal' | 'stop'>> {
  prompt: string
  seed?: number
  stop?: string[]
  adapter?: string
  compensation?: string | boolean
  eoraRank?: number
  json?: boolean
}

/** `kintsugi generate CHECKPOINT --prompt TEXT` */
export function registerGenerate(program: Command): void {
  const command = program
    .command('generate')
    .description('continue a text; the continuation is streamed to stdout')
    .argument('<checkpoint>', 'folder of the checkpoint, compressed or not')
    .requiredOption('--prompt <text>', 'what to continue')
    .option('--max-tokens <n>', 'most tokens to generate', numberArgument, 128)
    .option('--temperature <t>', '0 takes the most likely token every time', numberArgument, 0)
    .option('--top-k <n>', 'only the n most likely tokens; 0 for all', numberArgument, 0)
    .option('--top-p <share>', 'only the most likely tokens that reach this probability', numberArgument, 1)
    .option('--min-p <share>', 'only tokens at least this likely, relative to the most likely', numberArgument, 0)
    .option('--repetition-penalty <factor>', '1 for none', numberArgument, 1)
    .option('--seed <n>', 'makes sampling repeatable', numberArgument)
    .option('--stop <text>', 'ends the generation; may be given several times', listArgument)
    .option('--ignore-eos', 'go on after an end token', false)
    .option('--adapter <folder>', 'PEFT adapter to apply')
    .option('--compensation <folder>', 'factors to use beside those that the checkpoint has in eora/')
    .option('--no-compensation', 'leave out the compensation of a compressed checkpoint')
    .option('--eora-rank <n>', 'of each compensation no more than this many directions', numberArgument)
    .option('--json', 'print one JSON document')
  withModelOptions(command).action((checkpoint: string, given: GenerateArguments) =>
    runCommand(given.json, async ({ signal, follow }) => {
      const { json, prompt, precision, backend, compensation, eoraRank, adapter, ...options } = given
      const adapters: Record<string, string> = adapter === undefined ? {} : { adapter }
      const request = withoutUndefined({ precision, backend, compensation, eoraRank, adapters, signal })
      const loading = loadModel(checkpoint, request)
      using model = await follow(loading, 'load')
      const generation = model.generate(prompt, {
        ...options,
        signal,
        ...(adapter !== undefined && { adapter: 'adapter' }),
      })

      if (!json && process.stdout.isTTY) process.stdout.write(colorsFor(process.stdout).dim(prompt))
      const tokens: number[] = []
      let text = ''
      for await (const piece of generation) {
        tokens.push(piece.token)
        text += piece.text
        if (!json) process.stdout.write(piece.text)
      }
      const summary = generation.summary!
      if (process.stderr.isTTY) process.stderr.write(colorsFor(process.stderr).dim(`\n[${describe(summary)}]`))
      return { document: { prompt, text, tokenIds: tokens, ...summary }, text: '' }
    }),
  )
}

function describe({ tokens, finishReason, secondsDecode }: GenerationSummary): string {
  return `${tokens} tokens, ${(tokens / secondsDecode).toFixed(0)} per second, ended by ${finishReason}`
}
