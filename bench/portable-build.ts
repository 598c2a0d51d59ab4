// The kernels as they are published, compiled for every CPU of the target, beside the same source compiled for this CPU
// alone (`-Ctarget-cpu=native`): what choosing the level at run time costs.
//
//   KINTSUGI_THREADS=1 node --import=tsx bench/portable-build.ts [--rounds 5] [--sections stream,8,512]
//
// Both builds of `cargo bench --bench product` run in turn, each in a process of its own; medians of the rounds are
// compared, line by line, and the best rounds, which a busy machine disturbs less. The second build lies in `native/` of the target folder.
import { execFileSync } from 'node:child_process'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'

const ROOT = fileURLToPath(new URL('..', import.meta.url))
const { values } = parseArgs({
  options: { rounds: { type: 'string', default: '5' }, sections: { type: 'string', default: 'stream,8,512' } },
})

/** Compiles the bench and returns its executable. */
function build(target: string, flags: string): string {
  const command = ['bench', '--no-run', '-p', 'kintsugi-kernels', '--bench', 'product', '--message-format', 'json']
  const output = execFileSync('cargo', command, {
    cwd: ROOT,
    env: { ...process.env, CARGO_TARGET_DIR: target, RUSTFLAGS: flags },
    encoding: 'utf8',
    maxBuffer: 1 << 26,
    stdio: ['ignore', 'pipe', 'inherit'],
  })
  const messages = output.split('\n').filter(Boolean).map((line) => JSON.parse(line) as { executable?: string | null })
  const found = messages.findLast(({ executable }) => executable)?.executable
  if (!found) throw new Error('cargo names no executable')
  return found
}

/** Milliseconds by section and line. */
function run(executable: string): Map<string, number> {
  const output = execFileSync(executable, values.sections.split(','), { encoding: 'utf8' })
  const times = new Map<string, number>()
  let section = ''
  for (const line of output.split('\n')) {
    const [, name, milliseconds] = /^ {2}(\S.*?) +([\d.]+) ms/.exec(line) ?? []
    if (name) times.set(`${section} · ${name}`, Number(milliseconds))
    else if (/^\S/.test(line)) section = line.replace(/;.*/, '')
  }
  return times
}

function median(numbers: number[]): number {
  return numbers.sort((a, b) => a - b)[Math.floor(numbers.length / 2)]!
}

const target = process.env['CARGO_TARGET_DIR'] ?? join(ROOT, 'target')
const builds = [build(target, ''), build(join(target, 'native'), '-Ctarget-cpu=native')]
const times = builds.map(() => new Map<string, number[]>())
for (let round = 0; round < Number(values.rounds); round++) {
  builds.forEach((executable, index) => {
    for (const [name, milliseconds] of run(executable)) {
      times[index]!.set(name, [...(times[index]!.get(name) ?? []), milliseconds])
    }
  })
}
const more = (portable: number, native: number): string => `${(100 * (portable / native - 1)).toFixed(1)} %`
console.log('| product | portable, ms | for this CPU, ms | portable takes more | the best of either |')
console.log('|---|---|---|---|---|')
const ratios: { medians: number[]; best: number[] } = { medians: [], best: [] }
for (const [name, portable] of times[0]!) {
  const native = times[1]!.get(name)!
  const best = [Math.min(...portable), Math.min(...native)] as const
  const medians = [median(portable), median(native)] as const
  ratios.medians.push(medians[0] / medians[1])
  ratios.best.push(best[0] / best[1])
  console.log(`| ${name} | ${medians[0].toFixed(3)} | ${medians[1].toFixed(3)} | ${more(...medians)} | ${more(...best)} |`)
}
console.log(`\nmedian of the lines: ${more(median(ratios.medians), 1)} more, of the best of either: ${more(median(ratios.best), 1)} more`)
