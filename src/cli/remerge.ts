import { type Command, InvalidArgumentError } from 'commander'

import { remerge, type RemergeOptions } from '../index.js'
import { listArgument, numberArgument } from './arguments.js'
import { describePlan, describeReport } from './merge.js'
import { runCommand } from './run-command.js'

type RemergeArguments = Omit<RemergeOptions, 'signal'> & { json?: boolean }

/** `kintsugi remerge MERGED --add ADAPTER=WEIGHT --remove ADAPTER -o OUT` */
export function registerRemerge(program: Command): void {
  program
    .command('remerge')
    .description('merge anew what an earlier merge has merged, with some adapters more or less')
    .argument('<merged>', 'folder that merge has written; its report.json is the recipe')
    .requiredOption('-o, --out <folder>', 'folder to write; must not exist, or be empty')
    .option('--add <adapter=weight>', 'adapter that joins, weight 1 without; may be given several times', addArgument)
    .option('--remove <adapter>', 'adapter that leaves; may be given several times', listArgument)
    .option('--dry-run', 'check everything and print the plan; write nothing', false)
    .option('--json', 'print one JSON document')
    .action((merged: string, given: RemergeArguments) =>
      runCommand(given.json, async ({ signal, follow }) => {
        const { json: _, dryRun, ...options } = given
        if (dryRun) {
          const plan = await remerge(merged, { ...options, signal, dryRun: true })
          return { document: plan, text: describePlan(plan) }
        }
        const report = await follow(remerge(merged, { ...options, signal, dryRun: false }), 'merge')
        return { document: report, text: describeReport(report) }
      }),
    )
}

/** Parses `--add ADAPTER[=WEIGHT]`; the last `=` counts. */
function addArgument(value: string, previous: Record<string, number> | undefined): Record<string, number> {
  const match = /^(?<adapter>.+?)(?:=(?<weight>[^=/\\]*))?$/.exec(value)
  if (!match) throw new InvalidArgumentError('Give ADAPTER or ADAPTER=WEIGHT.')
  const { adapter, weight } = match.groups!
  return { ...previous, [adapter!]: weight === undefined ? 1 : numberArgument(weight) }
}
