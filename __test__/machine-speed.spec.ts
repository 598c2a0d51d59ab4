import { readFileSync } from 'node:fs'

import test, { type ExecutionContext } from 'ava'
import { KintsugiError, measureSpeed, type MeasureSpeedOptions, type SpeedReport, type Spread } from 'kintsugi'

import { failsWith } from './fixtures.js'

/** One round of the shortest products. */
const SHORT = { seconds: 0.001, rows: [1, 2] }

/** That nothing is missing, not a number or not positive. */
function positive(value: number): boolean {
  return Number.isFinite(value) && value > 0
}

function ordered({ low, median, high }: Spread): boolean {
  return positive(low) && low <= median && median <= high && Number.isFinite(high)
}

/**
 * Runs `work`. Matrices beyond a cache of gigabytes do not fit into the memory of every machine that has one; then the
 * error that says so is what is asked for, and the rest of a test is left out.
 */
async function withMemory(t: ExecutionContext, work: () => Promise<void>): Promise<void> {
  try {
    await work()
  } catch (error) {
    if (!(error instanceof KintsugiError && error.code === 'ERR_MEMORY_EXCEEDED')) throw error
    t.log(`left out: ${error.message}`)
    t.is(error.subject, 'memory')
    t.regex(error.message, /take \d+ MiB, and \d+ MiB are available/)
  }
}

test.serial('ceilings and products are measured on one thread and on all', async (t) => {
  await withMemory(t, async () => {
    const job = measureSpeed({ ...SHORT, threads: 2 })
    const phases = new Set<string>()
    for await (const { phase, done, total } of job.progress()) {
      phases.add(phase)
      t.true(done <= total || total === 0)
    }
    const report: SpeedReport = await job
    t.true(phases.has('measure'), [...phases].join())
    checkReport(t, report)
  })
})

function checkReport(t: ExecutionContext, report: SpeedReport): void {
  const { version } = JSON.parse(readFileSync(new URL('../package.json', import.meta.url), 'utf8'))
  t.is(report.version, version)
  t.is(report.platform, `${process.platform}-${process.arch}`)
  t.true(report.cpuName === null || (report.cpuName.length > 0 && report.cpuName !== 'unknown'))
  t.deepEqual(report.threads, [1, 2])
  t.true(positive(report.seconds))
  t.true(report.cacheBytes === null || report.workingSetBytes >= 2 * report.cacheBytes)

  for (const threads of report.threads) {
    const kinds = report.ceilings.filter((ceiling) => ceiling.threads === threads).map(({ kind }) => kind)
    t.true(['memory', 'int8', 'f32'].every((kind) => kinds.some((found) => found === kind)), kinds.join())
  }
  t.true(report.ceilings.every(({ rate, instructions }) => ordered(rate) && instructions.length > 0))
  // Ceilings belong to the products of every number of rows.
  const roundsOf = (rows: number): number => report.products.find((product) => product.rows === rows)!.rounds
  t.true(report.ceilings.every(({ rounds }) => rounds === roundsOf(1) + roundsOf(2)))

  // Five kinds of weights, two numbers of rows, two of threads.
  t.is(report.products.length, 5 * 2 * 2)
  const weights = report.outFeatures * report.inFeatures
  for (const product of report.products) {
    const name = JSON.stringify(product)
    t.true(ordered(product.seconds) && positive(product.share) && product.rounds >= 1, name)
    const { median } = product.seconds
    const close = (actual: number, expected: number): boolean => Math.abs(actual / expected - 1) < 1e-9
    t.true(close(product.bytesPerSecond, (product.bitsPerWeight * weights) / 8 / median), name)
    const factors = product.rank * (report.outFeatures + report.inFeatures)
    t.true(close(product.operationsPerSecond, (2 * product.rows * (weights + factors)) / median), name)
  }
  const bits = report.products.map(({ weights: kind, rank, bitsPerWeight }) => ({ kind, rank, bitsPerWeight }))
  // A scale of 16 bits for 128 weights; 64 ranks of 16 bits for 4096 inputs and outputs.
  t.true(bits.every(({ kind, rank, bitsPerWeight }) => {
    const expected = { int4: 4.125, int8: 8.125, bf16: 16 }[kind]! + (rank * 16 * 2) / 4096
    return Math.abs(bitsPerWeight - expected) < 0.2
  }), JSON.stringify(bits))

  t.is(report.models.length, 5 * 2 * 3)
  for (const model of report.models) {
    const product = report.products.find(
      ({ weights: kind, rank, precision, rows, threads }) =>
        rows === 1 && kind === model.weights && rank === model.rank && precision === model.precision && threads === model.threads,
    )!
    const expected = product.bytesPerSecond / ((model.parameters * product.bitsPerWeight) / 8)
    t.true(Math.abs(model.tokensPerSecond / expected - 1) < 1e-9)
  }
}

test.serial('one thread is measured once, and no row no model', async (t) => {
  await withMemory(t, async () => {
    const report = await measureSpeed({ seconds: 0.001, rows: [2], threads: 1 })
    t.deepEqual(report.threads, [1])
    t.is(report.products.length, 5)
    t.deepEqual(report.models, [])
  })
})

test.serial('it can be stopped', async (t) => {
  const stopped = async (options: MeasureSpeedOptions, stop: (job: ReturnType<typeof measureSpeed>) => unknown) => {
    const job = measureSpeed({ ...options, seconds: 3600 })
    await stop(job)
    const reason = await job.then(() => undefined, (error: unknown) => error)
    if (reason instanceof KintsugiError && reason.code === 'ERR_MEMORY_EXCEEDED') throw reason
    return reason
  }
  await withMemory(t, async () => {
    const controller = new AbortController()
    const reason = await stopped({ signal: controller.signal }, async (job) => {
      for await (const { phase } of job.progress()) if (phase === 'measure') controller.abort()
    })
    t.true(controller.signal.aborted)
    t.is(reason, controller.signal.reason)
  })
  await withMemory(t, async () => {
    const reason = await stopped({}, (job) => job.cancel())
    t.is((reason as { code?: string }).code, 'ERR_CANCELLED')
  })
})

test.serial('options that make no sense are refused by name', async (t) => {
  for (const [options, subject] of [
    [{ seconds: 0 }, 'seconds'],
    [{ threads: 0 }, 'threads'],
    [{ threads: 1.5 }, 'threads'],
    [{ rows: [] }, 'rows'],
    [{ rows: [0] }, 'rows[0]'],
    [{ rows: 8 }, 'rows'],
  ] as const) {
    await failsWith(t, () => measureSpeed(options as object), 'ERR_OPTION_INVALID', subject)
  }
  await failsWith(t, () => measureSpeed({ rows: [1, 8, 1] }), 'ERR_OPTION_INVALID', 'rows')
  await failsWith(t, () => measureSpeed({ second: 1 } as object), 'ERR_OPTION_UNKNOWN', 'second')
})
