import type { Command } from 'commander'

import { merge, type MergeOptions, type MergePlan, type MergeReport } from '../index.js'
import { numberArgument, numbersArgument } from './arguments.js'
import { formatBytes, formatSeconds, formatShare } from './format.js'
import { runCommand } from './run-command.js'
import { formatPairs, formatTable } from './table.js'

type MergeArguments = Omit<MergeOptions, 'signal'> & { json?: boolean }

const LARGEST_ERRORS_SHOWN = 5

/** `kintsugi merge ADAPTER... -o OUT` */
export function registerMerge(program: Command): void {
  program
    .command('merge')
    .description('merge LoRA adapters of one base model into one PEFT adapter')
    .argument('<adapter...>', 'PEFT folders')
    .requiredOption('-o, --out <folder>', 'folder to write; must not exist, or be empty')
    .option(
      '--method <name>',
      'lego, lego-gauge-free, cat, svd, linear, ties, dare-linear, dare-ties, magnitude-prune, knots, tsv or iso-c',
      'lego',
    )
    .option('--rank <n>', 'rank of the result; the largest of the adapters without', numberArgument)
    .option('--energy <share>', 'as few terms as hold this share of the exact sum', numberArgument)
    .option('--weights <list>', 'weight of each adapter, separated by commas; 1 for each without', numbersArgument)
    .option('--padding <name>', 'rank of the modules in the file: uniform, vllm or none', 'uniform')
    .option('--factor-type <name>', 'auto, bf16, f16 or f32', 'auto')
    .option('--coordinates <name>', 'TIES, DARE, pruning: factors, update, core or knots')
    .option('--density <share>', 'TIES, DARE, pruning: share of the elements that stay', numberArgument, 0.5)
    .option('--sign-election <name>', 'TIES: total or frequency', 'total')
    .option('--seed <n>', 'DARE, LEGO: seed', numberArgument, 0)
    .option('--restarts <n>', 'LEGO: starts of k-means', numberArgument, 10)
    .option('--iterations <n>', 'LEGO: most iterations of a start', numberArgument, 300)
    .option('--gauge <name>', 'LEGO: units as trained (raw), or of the singular value decomposition (svd)', 'raw')
    .option('--normalize', 'LEGO: cluster by direction', false)
    .option('--no-parameter-reweighting', 'LEGO: leave the centres as they are')
    .option('--no-output-reweighting', 'LEGO: leave the update as it is')
    .option('--reference-rank <n>', 'LEGO: reference of the output reweighting', numberArgument)
    .option('--scale <name>', 'at the end: method, closed-form or refit', 'method')
    .option('--no-report', 'do not measure what was kept')
    .option('--calibration <file>', 'saved statistics of the base model: count errors by what they do to outputs')
    .option('--compensation <folder>', 'eora/ of a compressed base, to be part of the result')
    .option('--total-rank <n>', 'with --compensation: rank of both together; added up without', numberArgument)
    .option('--modules-to-save <name>', 'modules that adapters hold whole: equal, mean or refuse', 'equal')
    .option('--allow-different-bases', 'merge adapters that name different base models', false)
    .option('--dry-run', 'check everything and print the plan; write nothing', false)
    .option('--json', 'print one JSON document')
    .action((adapters: string[], given: MergeArguments) =>
      runCommand(given.json, async ({ signal, follow }) => {
        const { json: _, dryRun, ...options } = given
        if (dryRun) {
          const plan = await merge(adapters, { ...options, signal, dryRun: true })
          return { document: plan, text: describePlan(plan) }
        }
        const report = await follow(merge(adapters, { ...options, signal, dryRun: false }), 'merge')
        return { document: report, text: describeReport(report) }
      }),
    )
}

/** A plan, for a reader. */
export function describePlan(plan: MergePlan): string {
  const ranks = plan.modules.map(({ rank }) => rank)
  return formatPairs(
    [
      ['base model', plan.baseModel ?? undefined],
      ['method', plan.recipe.method],
      ['modules', String(plan.modules.length)],
      ['whole tensors', plan.wholeTensors.length === 0 ? undefined : String(plan.wholeTensors.length)],
      ['rank', plan.recipe.options.rank && 'energy' in plan.recipe.options.rank ? 'by energy' : String(Math.max(...ranks))],
      ['factors', plan.factorType],
      ['size', `${formatBytes(plan.sourceBytes)} → ${formatBytes(plan.bytes)}`],
      ['working memory', `about ${formatBytes(plan.memoryBytes)}`],
      ['output', `${plan.recipe.out} (nothing was written)`],
    ],
    process.stdout,
  )
}

/** A report, for a reader. */
export function describeReport({ recipe, summary, modules }: MergeReport): string {
  const stage = summary.joined ? ', before the cut' : ''
  const distance = (value: number | null | undefined): string | undefined =>
    value === null || value === undefined ? undefined : formatShare(value)
  const pairs = formatPairs(
    [
      ['written', recipe.out],
      ['method', recipe.method],
      ['modules', String(summary.modules)],
      ['rank', String(summary.rank)],
      ['size', `${formatBytes(summary.sourceBytes)} → ${formatBytes(summary.bytes)}`],
      [`distance from the sum${stage}`, distance(summary.error)],
      ['of the outputs', distance(summary.weightedError)],
      [`cost of the cut to ${recipe.totalRank ?? ''}`, distance(summary.joined?.error)],
      ['cost for the outputs', distance(summary.joined?.weightedError)],
      ['time', formatSeconds(summary.seconds)],
      ['peak memory', summary.peakMemoryBytes === null ? undefined : formatBytes(summary.peakMemoryBytes)],
    ],
    process.stdout,
  )
  const share = (value: number | null): string => (value === null ? '' : formatShare(value))
  const adapters = formatTable(
    [
      { title: 'adapter' },
      { title: 'weight', align: 'right' },
      { title: 'modules', align: 'right' },
      { title: 'retained', align: 'right' },
      { title: 'multiple', align: 'right' },
    ],
    summary.adapters.map(({ path, weight, modules, retained, multiple }) => [
      path,
      String(weight),
      String(modules),
      share(retained),
      multiple === null ? '' : multiple.toFixed(3),
    ]),
    process.stdout,
  )
  const worst = modules
    .flatMap(({ name, rank, kept }) => (kept ? [{ name, rank, ...kept }] : []))
    .sort((a, b) => b.error - a.error)
    .slice(0, LARGEST_ERRORS_SHOWN)
  if (worst.length === 0) return `${pairs}\n\n${adapters}`
  const table = formatTable(
    [
      { title: `farthest from the sum${stage}` },
      { title: 'rank', align: 'right' },
      { title: 'distance', align: 'right' },
      { title: 'cosine', align: 'right' },
    ],
    worst.map(({ name, rank, error, cosine }) => [name, String(rank), formatShare(error), cosine?.toFixed(3) ?? '']),
    process.stdout,
  )
  return `${pairs}\n\n${adapters}\n\n${table}`
}
