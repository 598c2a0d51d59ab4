import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { createHash } from 'node:crypto'
import { existsSync, readdirSync, readFileSync, rmSync } from 'node:fs'
import { join } from 'node:path'

import test from 'ava'
import { compress } from 'kintsugi'

import { CALIBRATION_TEXT, LLAMA, ROOT, temporaryFolder } from '../fixtures.js'

const OPTIONS = {
  bits: 2,
  groupSize: 64,
  calibration: { text: CALIBRATION_TEXT, sequences: 8, length: 256 },
  eora: { rank: 8 },
} as const
/** Kills of all rounds together, at least; `KINTSUGI_KILLS=50 npx ava __test__/lifecycle/kill.spec.ts` takes its time. */
const KILLS = Number(process.env['KINTSUGI_KILLS'] ?? 3)

/** Hashes of all files but the report, which has times in it. */
function contents(folder: string): Record<string, string> {
  const files = readdirSync(folder, { recursive: true, withFileTypes: true }).filter((entry) => entry.isFile())
  const hashed = files
    .filter(({ name }) => name !== 'report.json')
    .map(({ parentPath, name }) => {
      const path = join(parentPath, name)
      return [path.slice(folder.length), createHash('sha256').update(readFileSync(path)).digest('hex')]
    })
  return Object.fromEntries(hashed.sort())
}

/** Runs the job in a process of its own and kills it after a while; whether it was done before. A job that fails throws. */
async function runAndKill(out: string, milliseconds: number): Promise<boolean> {
  const program = `
    import { compress } from ${JSON.stringify(`${ROOT}dist/index.js`)}
    await compress(${JSON.stringify(LLAMA)}, ${JSON.stringify({ ...OPTIONS, out })})`
  const child = spawn(process.execPath, ['--input-type=module', '--eval', program], { stdio: ['ignore', 'ignore', 'pipe'] })
  let complaint = ''
  child.stderr.setEncoding('utf8').on('data', (text: string) => (complaint += text))
  const timer = setTimeout(() => child.kill('SIGKILL'), milliseconds)
  const [code] = (await once(child, 'close')) as [number | null]
  clearTimeout(timer)
  if (code) throw new Error(`the job failed: ${complaint}`)
  // The folder gets its name last: a process that was killed after that had nothing left to do but to end.
  return code === 0 || existsSync(out)
}

test('a job that is killed again and again ends in the bytes of an undisturbed one', async (t) => {
  t.timeout(KILLS * 200_000)
  const folder = temporaryFolder(t)
  // One name for all: the adapter says which folder it belongs to.
  const undisturbed = join(folder, 'undisturbed', 'out')
  const { summary } = await compress(LLAMA, { ...OPTIONS, out: undisturbed })
  const expected = contents(undisturbed)
  const block = (summary.seconds / 8) * 1000

  for (let [round, total] = [0, 0]; total < KILLS; round++) {
    const out = join(folder, `round-${round}`, 'out')
    let kills = 0
    // Time for the start of the process and for up to three blocks, any moment of them; a little more after each kill,
    // so that a machine that is slower by now comes forward too.
    while (!(await runAndKill(out, 300 + block * (3 + kills / 8) * Math.random()))) {
      if (++kills > 100) {
        t.fail('the job does not come forward')
        break
      }
    }
    total += kills
    t.log(`killed ${kills} times, ${total} in all`)
    t.deepEqual(contents(out), expected)
    rmSync(out, { recursive: true })
  }
})
