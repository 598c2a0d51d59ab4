import type { Command } from 'commander'

import { doctor, type DoctorReport } from '../index.js'
import { runCommand } from './run-command.js'
import { formatPairs, formatTable } from './table.js'

/** `kintsugi doctor` */
export function registerDoctor(program: Command): void {
  program
    .command('doctor')
    .description('what this machine can do, and whether the kernels compute correctly on it')
    .option('--json', 'print one JSON document')
    .action((options: { json?: boolean }) =>
      runCommand(options.json, async () => {
        const report = await doctor()
        return { document: report, text: describe(report), exitCode: report.selfCheck.every(({ ok }) => ok) ? 0 : 1 }
      }),
    )
}

function describe(report: DoctorReport): string {
  const failed = report.selfCheck.filter(({ ok }) => !ok)
  const passed = report.selfCheck.length - failed.length
  const { cpu } = report
  const pairs = formatPairs(
    [
      ['kintsugi', report.version],
      ['Node.js', `${report.node} on ${report.platform}`],
      ['C library', report.glibc ? `glibc ${report.glibc}` : undefined],
      [
        'CPU level',
        `${cpu.selected}${cpu.selected === cpu.best ? '' : ` (best: ${cpu.best})`}, of ${cpu.levels.join(', ')}`,
      ],
      ['CPU features', cpu.features.join(', ') || 'none'],
      ['threads', String(report.threads)],
      ['self-check', `${passed} of ${report.selfCheck.length} cases within their error budget`],
    ],
    process.stdout,
  )
  if (failed.length === 0) return pairs
  const table = formatTable(
    [
      { title: 'failed case' },
      { title: 'level' },
      { title: 'precision' },
      { title: 'error', align: 'right' },
      { title: 'budget', align: 'right' },
    ],
    failed.map((check) => [
      check.case,
      check.level,
      check.precision,
      check.error.toExponential(2),
      check.budget.toExponential(2),
    ]),
    process.stdout,
  )
  return `${pairs}\n\n${table}`
}
