// Products of other engines beside our own, in one process and in turn: a Markdown table and JSON with medians and spread.
// usage: KINTSUGI_THREADS=2 npm run bench -- [ROWS,ROWS,...] [ROUNDS] [OUT.json] [MATRICES]
import { writeFileSync } from 'node:fs'
import { cpus, totalmem } from 'node:os'
import { setTimeout as pause } from 'node:timers/promises'

import { doctor, QuantizedLinear, type QuantizedLinearOptions } from 'kintsugi'

import type { Candidate, Problem } from './candidate.js'
import { Ggml } from './ggml.js'
import { onnxCandidate } from './onnx.js'

const N = 4096
const K = 4096
const [list = '1,2,4,8,128,512', roundsText = '9', out, matricesText = '24'] = process.argv.slice(2)
/** Together beyond any cache. */
const MATRICES = Number(matricesText)
const rowCounts = list.split(',').map(Number)
const rounds = Number(roundsText)

/** Normal numbers from a seed (SplitMix32, Box and Muller). */
function gaussian(count: number, seed: number): Float32Array {
  let state = seed >>> 0
  const uniform = (): number => {
    state = (state + 0x9e3779b9) >>> 0
    let z = state ^ (state >>> 16)
    z = Math.imul(z, 0x21f0aaad)
    z ^= z >>> 15
    z = Math.imul(z, 0x735a2d97)
    return ((z ^ (z >>> 15)) >>> 0) / 2 ** 32
  }
  return Float32Array.from({ length: count }, () => Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform()))
}

function kintsugiCandidate(name: string, { weights, inputs }: Problem, options: Omit<QuantizedLinearOptions, 'outFeatures' | 'inFeatures'>): Candidate {
  const layers = weights.map((weight) => QuantizedLinear.quantize(weight, { outFeatures: N, inFeatures: K, ...options }))
  const input = (rows: number): Float32Array => {
    const x = inputs.get(rows)
    if (!x) throw new Error(`no input of ${rows} rows`)
    return x
  }
  return {
    name,
    bytes: layers[0]?.info.memoryBytes ?? 0,
    run: (rows) => layers.forEach((layer) => layer.forward(input(rows))),
    first: (rows) => layers[0]?.forward(input(rows)) ?? new Float32Array(),
  }
}

function distance(a: Float32Array, b: Float32Array): number {
  let difference = 0
  let size = 0
  for (let i = 0; i < b.length; i++) {
    difference += ((a[i] ?? NaN) - (b[i] ?? NaN)) ** 2
    size += (b[i] ?? NaN) ** 2
  }
  return Math.sqrt(difference / size)
}

function quantile(sorted: number[], share: number): number {
  return sorted[Math.round(share * (sorted.length - 1))] ?? NaN
}

const { cpu, threads } = await doctor()
// Every matrix is the same numbers, in memory of its own once packed.
const weight = gaussian(N * K, 1)
const problem: Problem = {
  N,
  K,
  weights: Array.from({ length: MATRICES }, () => weight),
  inputs: new Map(rowCounts.map((rows) => [rows, gaussian(rows * K, 2)])),
  threads,
}
const ggml = new Ggml(cpu.selected, threads)
const candidates: Candidate[] = [
  kintsugiCandidate('kintsugi fast int4 g128', problem, { precision: 'fast', groupSize: 128, symmetric: true }),
  kintsugiCandidate('kintsugi fast int4 g32', problem, { precision: 'fast', groupSize: 32, symmetric: true }),
  kintsugiCandidate('kintsugi exact int4 g128', problem, { precision: 'exact', groupSize: 128, symmetric: true }),
  kintsugiCandidate('kintsugi fast int8 g32', problem, { precision: 'fast', bits: 8, groupSize: 32, symmetric: true }),
  ggml.candidate('Q4_0', problem),
  ggml.candidate('Q4_K', problem),
  ggml.candidate('Q8_0', problem),
  await onnxCandidate(problem, 128),
  await onnxCandidate(problem, 32),
]

// All of them multiply the same matrix: what differs is how they round it.
const reference = kintsugiCandidate('', { ...problem, weights: [weight] }, { precision: 'f32', bits: 8 })
const [least = 1] = rowCounts
for (const candidate of candidates) {
  const error = distance(await candidate.first(least), await reference.first(least))
  if (!(error < 0.15)) throw new Error(`${candidate.name} is ${error} away from the product`)
}

const results = []
for (const rows of rowCounts) {
  const seconds = new Map<Candidate, number[]>(candidates.map((candidate) => [candidate, []]))
  for (let round = -1; round < rounds; round++) {
    for (const candidate of candidates) {
      // Threads of the last candidate go to sleep.
      await pause(5)
      const start = process.hrtime.bigint()
      await candidate.run(rows)
      const taken = Number(process.hrtime.bigint() - start) / 1e9 / MATRICES
      if (round >= 0) seconds.get(candidate)?.push(taken)
    }
  }
  console.log(`\n| ${rows} ${rows === 1 ? 'row' : 'rows'}, ${threads} threads | median | 10–90 % | GB/s | GOP/s | time of kintsugi fast int4 g128 |`)
  console.log('|---|---|---|---|---|---|')
  let own = NaN
  for (const candidate of candidates) {
    const sorted = (seconds.get(candidate) ?? []).sort((a, b) => a - b)
    const median = quantile(sorted, 0.5)
    if (Number.isNaN(own)) own = median
    const [low, high] = [quantile(sorted, 0.1), quantile(sorted, 0.9)]
    results.push({ name: candidate.name, rows, median, low, high, bytes: candidate.bytes })
    const milliseconds = (value: number): string => (value * 1e3).toFixed(3)
    const rate = (candidate.bytes / median / 1e9).toFixed(1)
    const operations = ((2 * rows * N * K) / median / 1e9).toFixed(0)
    console.log(
      `| ${candidate.name} | ${milliseconds(median)} ms | ${milliseconds(low)}–${milliseconds(high)} | ${rate} | ${operations} | ${(median / own).toFixed(2)} |`,
    )
  }
}
if (out) {
  const machine = { cpu: cpus()[0]?.model, cpus: cpus().length, memory: totalmem(), level: cpu.selected, threads }
  writeFileSync(out, `${JSON.stringify({ date: new Date().toISOString(), machine, N, K, matrices: MATRICES, rounds, results }, null, 2)}\n`)
}
