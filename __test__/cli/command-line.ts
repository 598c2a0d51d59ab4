import { type ChildProcess, spawn } from 'node:child_process'
import { join } from 'node:path'

import { ROOT } from '../fixtures.js'

/** What a run of the command line gave. */
export interface Run {
  code: number | null
  stdout: string
  stderr: string
}

/** Starts the built command line. */
export function start(args: readonly string[]): { child: ChildProcess; ended: Promise<Run> } {
  const child = spawn(process.execPath, [join(ROOT, 'dist/cli/main.js'), ...args], {
    cwd: ROOT,
    stdio: ['ignore', 'pipe', 'pipe'],
  })
  const run = { stdout: '', stderr: '' }
  child.stdout.setEncoding('utf8').on('data', (text) => (run.stdout += text))
  child.stderr.setEncoding('utf8').on('data', (text) => (run.stderr += text))
  const ended = new Promise<Run>((resolve, reject) => {
    child.on('error', reject)
    child.on('close', (code) => resolve({ code, ...run }))
  })
  return { child, ended }
}

/** Runs the built command line to its end. */
export function kintsugi(...args: string[]): Promise<Run> {
  return start(args).ended
}
