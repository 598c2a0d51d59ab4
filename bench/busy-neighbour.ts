// One row on two threads, alone and beside a process that keeps one core busy: what a neighbour costs. With one task held
// up at a time the rest goes on, so that a product should take two times as long, not the time slices of a scheduler.
//
//   node --import=tsx bench/busy-neighbour.ts [--turns 9] [--threads 2]
//
// Quiet and busy measurements take turns. Where `taskset` exists the neighbour stays on the first core of this process;
// what else ran on the machine is printed with the result.
import { spawn, spawnSync } from 'node:child_process'
import { availableParallelism, loadavg } from 'node:os'
import { setTimeout as pause } from 'node:timers/promises'
import { parseArgs } from 'node:util'

import { QuantizedLinear } from 'kintsugi'

const { values } = parseArgs({
  options: { turns: { type: 'string', default: '9' }, threads: { type: 'string', default: '2' } },
})
process.env['KINTSUGI_THREADS'] = values.threads

const SIZE = 4096
/** Together beyond the caches of most machines. */
const MATRICES = 28
const PASSES = 10

let state = 1
const weights = Float32Array.from({ length: SIZE * SIZE }, () => {
  state = (Math.imul(state, 1664525) + 1013904223) >>> 0
  return state / 2 ** 32 - 0.5
})
const layers = Array.from({ length: MATRICES }, () =>
  QuantizedLinear.quantize(weights, { outFeatures: SIZE, inFeatures: SIZE, symmetric: true, precision: 'fast' }),
)
const x = weights.slice(0, SIZE)

function median(numbers: number[]): number {
  return numbers.sort((a, b) => a - b)[Math.floor(numbers.length / 2)]!
}

/** Milliseconds of each product of some passes over all matrices. */
function products(): number[] {
  const times: number[] = []
  for (let pass = 0; pass < PASSES; pass++) {
    for (const layer of layers) {
      const start = performance.now()
      layer.forward(x)
      times.push(performance.now() - start)
    }
  }
  return times
}

/** Runs `work` beside a process that only spins. */
async function besideNeighbour<T>(work: () => T): Promise<T> {
  const spin = [process.execPath, '-e', 'for (;;);']
  const { stdout } = spawnSync('taskset', ['-cp', String(process.pid)], { encoding: 'utf8' })
  const core = /list:\s*(\d+)/.exec(stdout ?? '')?.[1]
  const [program, ...args] = core === undefined ? spin : ['taskset', '-c', core, ...spin]
  const neighbour = spawn(program!, args, { stdio: 'ignore' })
  try {
    await pause(300)
    return work()
  } finally {
    neighbour.kill('SIGKILL')
    await new Promise((resolve) => neighbour.once('close', resolve))
    await pause(100)
  }
}

const load = loadavg()[0]!.toFixed(1)
products()
const quiet: number[] = []
const busy: number[] = []
const worst = { quiet: [] as number[], busy: [] as number[] }
for (let turn = 0; turn < Number(values.turns); turn++) {
  const alone = products()
  const beside = await besideNeighbour(products)
  quiet.push(alone.reduce((sum, time) => sum + time, 0) / alone.length)
  busy.push(beside.reduce((sum, time) => sum + time, 0) / beside.length)
  worst.quiet.push(Math.max(...alone))
  worst.busy.push(Math.max(...beside))
}
const product = `int4 g128 fast, ${SIZE}×${SIZE}, one row, ${values.threads} threads`
console.log(`${availableParallelism()} cores, load before: ${load}; ${product}`)
console.log('| | mean of a product, median of the turns | longest product, median of the turns |')
console.log('|---|---|---|')
console.log(`| alone | ${median(quiet).toFixed(3)} ms | ${median(worst.quiet).toFixed(2)} ms |`)
console.log(`| beside a busy neighbour | ${median(busy).toFixed(3)} ms | ${median(worst.busy).toFixed(2)} ms |`)
console.log(`\n${(median(busy) / median(quiet)).toFixed(2)} times as long`)
