import type { Command } from 'commander'

import { Checkpoint, type CheckpointInfo } from '../index.js'
import { formatBytes, formatCount } from './format.js'
import { runCommand } from './run-command.js'
import { formatPairs } from './table.js'

/** `kintsugi inspect PATH` */
export function registerInspect(program: Command): void {
  program
    .command('inspect')
    .description('what a checkpoint is: architecture, number types, sizes, bits per weight, what can be done with it')
    .argument('<path>', 'folder of the checkpoint')
    .option('--json', 'print one JSON document')
    .action((path: string, options: { json?: boolean }) =>
      runCommand(options.json, async () => {
        const { info } = await Checkpoint.open(path)
        return { document: info, text: describe(info) }
      }),
    )
}

function describe(info: CheckpointInfo): string {
  const { spec, quantization, compensation } = info
  return formatPairs(
    [
      ['checkpoint', info.path],
      ['architecture', info.architecture ?? 'not named'],
      ['parameters', info.parameters === null ? undefined : formatCount(info.parameters)],
      ['tensors', String(info.tensors)],
      ['size', `${formatBytes(info.bytes)} (${describeTypes(info.dtypes)})`],
      ['blocks', spec ? `${spec.layers} of width ${spec.hiddenSize}, with ${info.linears} Linears` : undefined],
      ['quantization', quantization ? describeQuantization(quantization) : 'none'],
      ['compensation', compensation ? describeCompensation(compensation) : undefined],
      ['bits per weight', info.bitsPerWeight?.toFixed(2)],
      ['can be compressed', info.canCompress ? 'yes' : 'no'],
      ['can be run', info.canRun ? 'yes' : 'no'],
      ['because', info.reason ?? undefined],
      ['notice', info.notices.join('; ') || undefined],
    ],
    process.stdout,
  )
}

function describeTypes(dtypes: CheckpointInfo['dtypes']): string {
  const types = Object.entries(dtypes).sort(([, a], [, b]) => b - a)
  return types.map(([dtype, bytes]) => `${formatBytes(bytes)} ${dtype}`).join(', ')
}

function describeQuantization(quantization: NonNullable<CheckpointInfo['quantization']>): string {
  const { format, bits, groupSize, symmetric } = quantization
  const groups = groupSize === null ? 'one group per row' : `groups of ${groupSize}`
  return `${bits} bits, ${groups}, ${symmetric ? 'symmetric' : 'asymmetric'} (${format})`
}

function describeCompensation(compensation: NonNullable<CheckpointInfo['compensation']>): string {
  const { linears, smallestRank, largestRank } = compensation
  const ranks = smallestRank === largestRank ? `rank ${largestRank}` : `ranks ${smallestRank} to ${largestRank}`
  return `${ranks} on ${linears} Linears (eora/)`
}
