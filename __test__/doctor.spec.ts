import { readFileSync } from 'node:fs'
import { join } from 'node:path'

import test from 'ava'
import { doctor } from 'kintsugi'

import { ROOT } from './fixtures.js'

test('the kernels of every level compute correctly on this machine', async (t) => {
  const report = await doctor()
  t.is(report.version, JSON.parse(readFileSync(join(ROOT, 'package.json'), 'utf8')).version)
  t.is(report.node, process.versions.node)
  t.is(report.platform, `${process.platform}-${process.arch}`)
  t.true(report.threads >= 1)
  t.true(report.cpu.levels.includes('scalar'))
  t.true(report.cpu.levels.includes(report.cpu.selected))
  for (const level of report.cpu.levels) {
    t.true(
      report.selfCheck.some((check) => check.level === level),
      level,
    )
  }
  for (const { case: name, level, error, budget, ok } of report.selfCheck) {
    t.true(ok && error <= budget, `${name} on ${level}: ${error} > ${budget}`)
  }
})
