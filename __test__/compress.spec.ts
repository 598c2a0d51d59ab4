import { existsSync, readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'

import test from 'ava'
import { Checkpoint, compress, type CompressReport, loadModel, type Progress } from 'kintsugi'

import {
  CALIBRATION_TEXT,
  failsWith,
  LLAMA,
  SHORT_CALIBRATION,
  STORIES,
  temporaryFolder,
  textSlice,
  TINY,
} from './fixtures.js'

const LINEARS = 14

test('GPTQ with EoRA: report, folder and progress', async (t) => {
  const out = join(temporaryFolder(t), 'w4')
  const job = compress(TINY, { out, bits: 4, groupSize: 64, calibration: SHORT_CALIBRATION, eora: { rank: 8 } })
  const seen: Progress[] = []
  for await (const reading of job.progress()) seen.push(reading)
  const report = await job

  t.true(seen.length > 0)
  t.is(seen.at(-1)!.done, seen.at(-1)!.total)

  const { recipe, summary, linears } = report
  t.like(recipe, { source: TINY, out, method: 'gptq', bits: 4, groupSize: 64, actOrder: true, staticGroups: true })
  const { text: file, sequences, length } = SHORT_CALIBRATION
  const usual = { kind: 'text', field: 'text', seed: null, holdOut: 1, weight: 1 } as const
  t.deepEqual(recipe.calibration, { sources: [{ file, sequences, ...usual }], length, subset: false })
  t.deepEqual(summary.calibration, [{ file, kind: 'text', tokens: sequences * length, weight: 1, share: 1 }])
  t.is(linears.length, LINEARS)
  t.is(summary.calibrationTokens, SHORT_CALIBRATION.sequences * SHORT_CALIBRATION.length)
  for (const { name, rank, bits, error } of linears) {
    t.is(bits, 4)
    t.is(rank, 8, name)
    t.true(error!.compensated < error!.quantized, name)
    t.true(error!.bound <= error!.compensated * (1 + 1e-6), name)
  }
  const storedBits = linears.reduce((sum, linear) => sum + linear.storedBits, 0)
  t.is(summary.bitsPerWeight, storedBits / summary.quantizedWeights)
  t.true(summary.bytes < summary.sourceBytes)

  t.false(existsSync(`${out}.partial`))
  const written = JSON.parse(readFileSync(join(out, 'report.json'), 'utf8')) as CompressReport
  t.deepEqual(written, JSON.parse(JSON.stringify(report)))
  for (const file of ['config.json', 'tokenizer.json', 'eora/adapter_config.json', 'eora/adapter_model.safetensors']) {
    t.true(existsSync(join(out, file)), file)
  }
  const config = JSON.parse(readFileSync(join(out, 'config.json'), 'utf8'))
  t.like(config.quantization_config, { quant_method: 'compressed-tensors', format: 'pack-quantized' })
  const adapter = JSON.parse(readFileSync(join(out, 'eora/adapter_config.json'), 'utf8'))
  t.is(Object.keys(adapter.rank_pattern).length, LINEARS)
  t.deepEqual(adapter.alpha_pattern, adapter.rank_pattern)

  const { info } = await Checkpoint.open(out)
  t.like(info.quantization, { bits: 4, groupSize: 64, symmetric: false })
  t.deepEqual(info.compensation, { linears: LINEARS, smallestRank: 8, largestRank: 8 })
  t.true(Math.abs(info.bitsPerWeight! - summary.bitsPerWeight) < 1e-9)
  t.false(info.canCompress)
  t.true(info.canRun)
})

test('RTN needs no calibration, and less is lost with more bits', async (t) => {
  const folder = temporaryFolder(t)
  const text = textSlice(STORIES, 20_000)
  const perplexities: number[] = []
  for (const bits of [2, 4, 8] as const) {
    const out = join(folder, `w${bits}`)
    const { summary, linears } = await compress(TINY, { out, method: 'rtn', bits, groupSize: 32 })
    t.is(summary.calibrationTokens, 0)
    t.is(summary.meanError, null)
    t.true(linears.every(({ rank, error }) => rank === 0 && error === null))
    t.false(existsSync(join(out, 'eora')))
    using model = await loadModel(out)
    perplexities.push((await model.perplexity(text, { length: 128 })).perplexity)
  }
  const [two, four, eight] = perplexities as [number, number, number]
  t.true(two > four && four > eight, perplexities.join(' '))
})

test('a bit budget gives Linears widths of their own', async (t) => {
  const folder = temporaryFolder(t)
  const options = { method: 'rtn', groupSize: 32, calibration: SHORT_CALIBRATION, bitBudget: 4 } as const
  const plan = await compress(TINY, { ...options, out: join(folder, 'plan'), dryRun: true })
  t.is(plan.bitsPerWeight, 4)
  t.true(plan.linears.every(({ bits }) => bits === null))
  const out = join(folder, 'mixed')
  const { recipe, summary, linears } = await compress(TINY, { ...options, out })
  t.is(recipe.bitBudget, 4)
  t.true(summary.bitsPerWeight <= 4)
  t.true(new Set(linears.map(({ bits }) => bits)).size > 1)
  using model = await loadModel(out)
  t.not(await model.generate('Once upon a time', { maxTokens: 8 }).text(), '')
  await failsWith(t, () => compress(TINY, { ...options, out, bits: 4 }), 'ERR_OPTION_INVALID', 'bitBudget')
  const tight = { ...options, bitBudget: 2, out: join(folder, 'tight') }
  await failsWith(t, () => compress(TINY, tight), 'ERR_OPTION_INVALID', 'bitBudget')
})

test('groups lie along the better axis', async (t) => {
  const out = join(temporaryFolder(t), 'axes')
  const calibration = SHORT_CALIBRATION
  const { summary, linears } = await compress(TINY, { out, bits: 3, groupSize: 32, groupAxis: 'adaptive', calibration })
  t.is(summary.format, 'kintsugi')
  t.deepEqual(new Set(linears.map(({ groupAxis }) => groupAxis)), new Set(['input', 'output']))
  const { info } = await Checkpoint.open(out)
  t.is(info.quantization!.format, 'kintsugi')
  t.true(Math.abs(info.bitsPerWeight! - summary.bitsPerWeight) < 0.01)
  using model = await loadModel(out)
  t.not(await model.generate('Once upon a time', { maxTokens: 8 }).text(), '')
})

test('symmetric whole-row codes work end to end', async (t) => {
  const out = join(temporaryFolder(t), 'w8')
  const report = await compress(TINY, { out, method: 'rtn', bits: 8, groupSize: 'whole', symmetric: true })
  t.is(report.recipe.groupSize, null)
  using model = await loadModel(out)
  t.not(await model.generate('Once upon a time', { maxTokens: 8 }).text(), '')
})

test('the same recipe gives the same bytes', async (t) => {
  const folder = temporaryFolder(t)
  const options = { bits: 3, groupSize: 64, calibration: SHORT_CALIBRATION, eora: { rank: 4 } } as const
  await compress(TINY, { ...options, out: join(folder, 'a') })
  await compress(TINY, { ...options, out: join(folder, 'b') })
  const files = readdirSync(join(folder, 'a'), { recursive: true, encoding: 'utf8' })
  const weights = files.filter((file) => file.endsWith('.safetensors'))
  t.true(weights.length >= 2)
  for (const file of weights) {
    t.true(readFileSync(join(folder, 'a', file)).equals(readFileSync(join(folder, 'b', file))), file)
  }
})

test('the compensation can be left out when loading', async (t) => {
  const out = join(temporaryFolder(t), 'w2')
  await compress(TINY, { out, bits: 2, groupSize: 64, calibration: SHORT_CALIBRATION, eora: { rank: 32 } })
  const text = textSlice(STORIES, 20_000)
  const perplexity = async (compensation: boolean): Promise<number> => {
    using model = await loadModel(out, { compensation })
    return (await model.perplexity(text, { length: 128 })).perplexity
  }
  t.true((await perplexity(true)) < (await perplexity(false)))
})

test('a dry run gives the plan and writes nothing', async (t) => {
  const folder = temporaryFolder(t)
  const options = { out: join(folder, 'out'), calibration: SHORT_CALIBRATION, eora: { rank: 8 } } as const
  const plan = await compress(TINY, { ...options, dryRun: true })
  t.deepEqual(readdirSync(folder), [])
  t.is(plan.architecture, 'LlamaForCausalLM')
  t.is(plan.linears.length, LINEARS)
  const { peakBytes, budgetBytes, activationsOnDisk, passes, parts } = plan.memory
  t.true(peakBytes > parts.weights + parts.statistics && peakBytes <= budgetBytes)
  t.deepEqual([activationsOnDisk, passes], [false, 1])
  t.true(plan.disk.neededBytes > plan.bytes)
  const { summary } = await compress(TINY, options)
  t.is(summary.bitsPerWeight, plan.bitsPerWeight)
})

test('a cancelled or aborted job stops soon, and the same call goes on with it', async (t) => {
  const folder = temporaryFolder(t)
  const options = { out: join(folder, 'out'), calibration: { text: STORIES, sequences: 128, length: 256 } }
  const controller = new AbortController()
  const aborted = compress(TINY, { ...options, signal: controller.signal })
  for await (const _ of aborted.progress()) break
  const reason = new Error('enough')
  controller.abort(reason)
  t.is(await t.throwsAsync(async () => aborted), reason)
  t.false(existsSync(options.out))

  const cancelled = compress(TINY, options)
  cancelled.cancel()
  await t.throwsAsync(async () => cancelled, { message: /cancel/ })
  t.false(existsSync(options.out))

  await compress(TINY, options)
  t.deepEqual(readdirSync(folder), ['out'])
})

test('what an interrupted job left is refused to another one, unless it is discarded', async (t) => {
  const folder = temporaryFolder(t)
  const out = join(folder, 'out')
  const calibration = { text: CALIBRATION_TEXT, sequences: 8, length: 256 }
  const job = compress(LLAMA, { out, bits: 4, groupSize: 64, calibration })
  for await (const { phase, done } of job.progress()) if (phase === 'compress' && done >= 1) break
  job.cancel()
  await t.throwsAsync(async () => job, { code: 'ERR_CANCELLED' })
  t.deepEqual(readdirSync(folder), ['out.partial'])

  const other = { out, bits: 3, groupSize: 64, calibration } as const
  const error = await failsWith(t, () => compress(LLAMA, other), 'ERR_RESUME_MISMATCH', /out\.partial$/)
  t.regex(error?.message ?? '', /recipe\.bits 4, this one has 3/)
  const report = await compress(LLAMA, { ...other, fresh: true })
  t.is(report.recipe.bits, 3)
  t.deepEqual(readdirSync(folder), ['out'])
})
