import type { Command } from 'commander'

import { fold, type FoldOptions, type FoldReport } from '../index.js'
import { numberArgument } from './arguments.js'
import { formatBytes, formatSeconds } from './format.js'
import { runCommand } from './run-command.js'
import { formatPairs } from './table.js'

type FoldArguments = Omit<FoldOptions, 'signal'> & { json?: boolean }

/** `kintsugi fold CHECKPOINT ADAPTER -o OUT` */
export function registerFold(program: Command): void {
  program
    .command('fold')
    .description('add a LoRA adapter to the weights of its base model')
    .argument('<checkpoint>', 'folder of the base model, not quantized')
    .argument('<adapter>', 'PEFT folder')
    .requiredOption('-o, --out <folder>', 'folder to write; must not exist, or be empty')
    .option('--weight <number>', 'what the update is multiplied with', numberArgument, 1)
    .option('--element-type <name>', 'auto, bf16, f16 or f32', 'auto')
    .option('--json', 'print one JSON document')
    .action((checkpoint: string, adapter: string, given: FoldArguments) =>
      runCommand(given.json, async ({ signal, follow }) => {
        const { json: _, ...options } = given
        const report = await follow(fold(checkpoint, adapter, { ...options, signal }), 'fold')
        return { document: report, text: describe(report) }
      }),
    )
}

function describe({ recipe, modules, wholeTensors, bytes, seconds, peakMemoryBytes }: FoldReport): string {
  return formatPairs(
    [
      ['written', recipe.out],
      ['weights changed', String(modules)],
      ['tensors replaced', wholeTensors > 0 ? String(wholeTensors) : undefined],
      ['size', formatBytes(bytes)],
      ['time', formatSeconds(seconds)],
      ['peak memory', peakMemoryBytes === null ? undefined : formatBytes(peakMemoryBytes)],
    ],
    process.stdout,
  )
}
