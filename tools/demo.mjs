// `npm run demo`: prepares the clone and runs examples/mend.ts.
import { spawn } from 'node:child_process'

import { prepare, root } from './prepare.mjs'

try {
  await prepare()
} catch (error) {
  process.stderr.write(`${error.message}\n`)
  process.exit(1)
}
const demo = spawn(process.execPath, ['--import=tsx', 'examples/mend.ts', ...process.argv.slice(2)], {
  cwd: root,
  stdio: 'inherit',
})
// The demo cleans up after an interruption; it decides when that is done.
process.on('SIGINT', () => {})
demo.on('close', (code) => {
  process.exitCode = code ?? 1
})
