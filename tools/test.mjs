// `npm test`: prepares the clone, runs every check, and ends with one line: `N passed, N failed`.
import { spawn } from 'node:child_process'
import { existsSync } from 'node:fs'

import { prepare, root } from './prepare.mjs'

const CHECKS = [
  { name: 'Rust formatting', command: ['cargo', 'fmt', '--all', '--check'] },
  { name: 'TypeScript types', command: [process.execPath, 'node_modules/typescript/bin/tsc', '-p', 'tsconfig.json'] },
  {
    name: 'Rust lints',
    command: ['cargo', 'clippy', '--release', '--workspace', '--all-targets', '--', '-D', 'warnings'],
  },
  {
    name: 'Rust tests',
    command: ['cargo', 'test', '--release', '--workspace', '--no-fail-fast'],
    count: (output) => sum(output, /^test result: .*?(\d+) passed; (\d+) failed/gm),
  },
  {
    name: 'Node tests',
    command: [process.execPath, 'node_modules/ava/entrypoints/cli.mjs'],
    count: countAva,
  },
]

if (process.env.CI && existsSync(`${root}.git`)) {
  // The addon was just built, which writes the loader and its types anew.
  const generated = ['index.js', 'index.d.ts']
  CHECKS.unshift({ name: 'Generated files are current', command: ['git', 'diff', '--exit-code', '--stat', ...generated] })
}

/** Adds up the two groups of every match. */
function sum(output, pattern) {
  let passed = 0
  let failed = 0
  for (const [, good, bad] of output.matchAll(pattern)) {
    passed += Number(good)
    failed += Number(bad)
  }
  return { passed, failed }
}

function countAva(output) {
  const total = (pattern) => [...output.matchAll(pattern)].reduce((count, [, number]) => count + Number(number), 0)
  return {
    passed: total(/^\s*(\d+) tests? passed/gm),
    failed: total(/^\s*(\d+) (?:tests? failed|uncaught exceptions?|unhandled rejections?)/gm),
  }
}

/** Runs a command; its output is shown as it comes and returned without colours. */
function run([program, ...args]) {
  return new Promise((resolve) => {
    let output = ''
    const child = spawn(program, args, { cwd: root, stdio: ['ignore', 'pipe', 'pipe'] })
    for (const stream of [child.stdout, child.stderr]) {
      stream.setEncoding('utf8').on('data', (text) => {
        output += text
        process.stdout.write(text)
      })
    }
    child.on('error', (error) => resolve({ code: 1, output: `${error.message}\n` }))
    child.on('close', (code) => resolve({ code, output: output.replace(/\u001B\[[\d;]*m/g, '') }))
  })
}

let passed = 0
let failed = 0
try {
  await prepare()
} catch (error) {
  process.stdout.write(`${error.message}\n0 passed, 1 failed\n`)
  process.exit(1)
}
const failures = []
for (const { name, command, count } of CHECKS) {
  process.stdout.write(`\n── ${name}: ${command.slice(command[0] === process.execPath ? 1 : 0).join(' ')}\n`)
  const { code, output } = await run(command)
  const result = count?.(output) ?? { passed: code === 0 ? 1 : 0, failed: 0 }
  // A check that fails without a failed test (it did not compile, it crashed) counts as one failure.
  if (code !== 0 && result.failed === 0) result.failed = 1
  if (result.failed > 0) failures.push(name)
  passed += result.passed
  failed += result.failed
}
if (failures.length > 0) process.stdout.write(`\nfailed: ${failures.join(', ')}\n`)
process.stdout.write(`\n${passed} passed, ${failed} failed\n`)
process.exitCode = failed === 0 ? 0 : 1
