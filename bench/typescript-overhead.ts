// What a call of QuantizedLinear.forward costs beside the product itself, in one process.
//
//   node --import=tsx bench/typescript-overhead.ts [--threads N] [--turns 5] [--seconds 3]
//
// First the call alone: its outputs, and forward with matrices so small that the product takes a few microseconds, which
// bounds what the call can add. Then int4 in groups of 128, 4096×4096, `fast`, with enough matrices in turn to be beyond the caches:
// measureSpeed, which calls the same products from Rust into one output, and forward, with outputs of its own and into one,
// take turns; medians of the turns are compared.
import { parseArgs } from 'node:util'

import { measureSpeed, QuantizedLinear } from 'kintsugi'

const { values } = parseArgs({
  options: {
    threads: { type: 'string' },
    turns: { type: 'string', default: '5' },
    seconds: { type: 'string', default: '3' },
  },
})
if (values.threads) process.env['KINTSUGI_THREADS'] = values.threads
const turns = Number(values.turns)
const seconds = Number(values.seconds)

const SIZE = 4096
const ROWS = [1, 8, 512]
/** As measureSpeed: from that many rows on one product a round. */
const LONG_ROWS = 64

function median(numbers: number[]): number {
  return numbers.sort((a, b) => a - b)[Math.floor(numbers.length / 2)]!
}

/** Evenly spread numbers from a linear congruence. */
function noise(count: number): Float32Array {
  let state = 1
  return Float32Array.from({ length: count }, () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0
    return state / 2 ** 32 - 0.5
  })
}

function quantize(outFeatures: number, inFeatures: number, weights = noise(outFeatures * inFeatures)): QuantizedLinear {
  return QuantizedLinear.quantize(weights, { outFeatures, inFeatures, symmetric: true, precision: 'fast' })
}

/** Seconds of a call, once for each of `layers`. */
function forward(layers: QuantizedLinear[], x: Float32Array, out?: Float32Array): number {
  const start = performance.now()
  for (const layer of layers) layer.forward(x, out)
  return (performance.now() - start) / 1e3 / layers.length
}

/** Microseconds of `work`, in batches of ten: their median and the best. */
function show(name: string, work: () => number): void {
  const batches = Array.from({ length: 2000 }, work)
  console.log(`${name}: ${(median(batches) * 1e6).toFixed(2)} µs, at best ${(Math.min(...batches) * 1e6).toFixed(2)} µs`)
}

let kept: Float32Array | undefined
show(`new Float32Array(${SIZE}), the outputs of one row`, () => {
  const start = performance.now()
  for (let i = 0; i < 10; i++) kept = new Float32Array(SIZE)
  return (performance.now() - start) / 1e4
})
if (kept?.length !== SIZE) throw new Error('nothing was allocated')
for (const [outFeatures, inFeatures] of [
  [32, 32],
  [32, SIZE],
  [SIZE, 32],
] as const) {
  const layer = quantize(outFeatures, inFeatures)
  const x = noise(inFeatures)
  const calls = Array.from({ length: 10 }, () => layer)
  show(`${outFeatures}×${inFeatures}, call and product`, () => forward(calls, x))
}

const inRust = new Map(ROWS.map((rows) => [rows, [] as number[]]))
const inTypeScript = new Map(ROWS.map((rows) => [rows, [] as number[]]))
const intoOne = new Map(ROWS.map((rows) => [rows, [] as number[]]))
const first = await measureSpeed({ seconds, rows: ROWS })
const threads = Math.max(...first.threads)
const weights = noise(SIZE * SIZE)
const count = Math.ceil(first.workingSetBytes / quantize(SIZE, SIZE, weights).info.memoryBytes)
const layers = Array.from({ length: count }, () => quantize(SIZE, SIZE, weights))
for (let turn = 0; turn < turns; turn++) {
  const report = await measureSpeed({ seconds, rows: ROWS })
  for (const product of report.products) {
    if (product.threads !== threads || product.weights !== 'int4' || product.rank > 0 || product.precision !== 'fast') continue
    inRust.get(product.rows)!.push(product.seconds.median)
  }
  for (const rows of ROWS) {
    const x = noise(rows * SIZE)
    const out = new Float32Array(rows * SIZE)
    const times = (out?: Float32Array): number[] =>
      Array.from({ length: 9 }, (_, round) => forward(rows < LONG_ROWS ? layers : [layers[round % count]!], x, out))
    inTypeScript.get(rows)!.push(median(times()))
    intoOne.get(rows)!.push(median(times(out)))
  }
}
console.log(`\n| int4 g128 fast, ${SIZE}×${SIZE}, ${threads} threads | Rust | TypeScript | added | of the speed | into \`out\` | of the speed |`)
console.log('|---|---|---|---|---|---|---|')
for (const rows of ROWS) {
  const [rust, own, one] = [inRust, inTypeScript, intoOne].map((times) => median(times.get(rows)!)) as [number, number, number]
  const milliseconds = (seconds: number): string => `${(seconds * 1e3).toFixed(3)} ms`
  const share = (seconds: number): string => `${((100 * rust) / seconds).toFixed(1)} %`
  console.log(
    `| ${rows} ${rows === 1 ? 'row' : 'rows'} | ${milliseconds(rust)} | ${milliseconds(own)} | ${((own - rust) * 1e6).toFixed(1)} µs | ${share(own)} | ${milliseconds(one)} | ${share(one)} |`,
  )
}
