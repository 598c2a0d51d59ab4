import { existsSync, readFileSync, rmSync } from 'node:fs'
import { join } from 'node:path'

import test from 'ava'
import {
  type CalibrationOptions,
  compensate,
  type CompensateOptions,
  type CompensationReport,
  compress,
  loadModel,
  type Progress,
} from 'kintsugi'

import { failsWith, LLAMA, SHORT_CALIBRATION, STORIES, temporaryFolder, textSlice, TINY } from './fixtures.js'

const LINEARS = 14
const calibration = SHORT_CALIBRATION
const text = textSlice(STORIES, 20_000)

async function perplexity(folder: string, options: Parameters<typeof loadModel>[1]): Promise<number> {
  using model = await loadModel(folder, options)
  return (await model.perplexity(text, { length: 128 })).perplexity
}

test('a compressed checkpoint gets its factors, and less of them at load', async (t) => {
  const folder = temporaryFolder(t)
  const [compressed, out] = [join(folder, 'w2'), join(folder, 'eora')]
  await compress(TINY, { out: compressed, method: 'rtn', bits: 2, groupSize: 32 })
  const options = { out, calibration, eora: { rank: 16 } }
  const plan = await compensate(TINY, compressed, { ...options, dryRun: true })
  t.is(plan.linears.length, LINEARS)
  t.false(existsSync(out))

  const job = compensate(TINY, compressed, options)
  const seen: Progress[] = []
  for await (const reading of job.progress()) seen.push(reading)
  const report = await job
  t.is(seen.at(-1)!.done, seen.at(-1)!.total)
  t.like(report.recipe, { original: TINY, compressed, out })
  t.deepEqual(report.recipe.eora, { rank: 16, solver: 'fast', factorBits: 16, inputs: 'deployed', allocation: null })
  t.is(report.summary.bytes, plan.bytes)
  t.is(report.summary.calibrationTokens, calibration.sequences * calibration.length)
  t.like(report.summary.compensation, { certified: LINEARS, uncertified: 0, meanRank: 16, allocation: null })
  for (const { name, error, holdOut, certificate } of report.linears) {
    t.true(error!.bound <= error!.compensated && error!.compensated < error!.quantized, name)
    t.true(holdOut!.compensated < holdOut!.quantized, name)
    t.true(certificate!.holds, name)
  }
  const written = JSON.parse(readFileSync(join(out, 'report.json'), 'utf8')) as CompensationReport
  t.deepEqual(written, JSON.parse(JSON.stringify(report)))
  const config = JSON.parse(readFileSync(join(out, 'adapter_config.json'), 'utf8'))
  t.like(config, { peft_type: 'LORA', r: 16, lora_alpha: 16, base_model_name_or_path: 'w2' })
  t.deepEqual(config.alpha_pattern, config.rank_pattern)

  const none = await perplexity(compressed, {})
  const part = await perplexity(compressed, { compensation: out, eoraRank: 4 })
  const all = await perplexity(compressed, { compensation: out })
  t.true(all < part && part < none, `${all} ${part} ${none}`)
  t.is(await perplexity(compressed, { compensation: out, eoraRank: 0 }), none)
  // The same factors as an adapter stay outside of the products.
  using model = await loadModel(compressed, { adapters: { eora: out } })
  const beside = await model.perplexity(text, { length: 128, adapter: 'eora' })
  t.true(Math.abs(beside.perplexity / all - 1) < 5e-4, `${beside.perplexity} ${all}`)
})

test('an affine compensation is never worse where it was solved, and belongs into the model', async (t) => {
  const folder = temporaryFolder(t)
  const [compressed, out] = [join(folder, 'w2'), join(folder, 'eora')]
  await compress(TINY, { out: compressed, method: 'rtn', bits: 2, groupSize: 32 })
  const plain = await compensate(TINY, compressed, { out: join(folder, 'plain'), calibration, eora: { rank: 8 } })
  const eora = { rank: 8, affine: true }
  const plan = await compensate(TINY, compressed, { out, calibration, eora, dryRun: true })
  const report = await compensate(TINY, compressed, { out, calibration, eora })
  t.deepEqual(report.recipe.eora, {
    rank: 8,
    solver: 'fast',
    factorBits: 16,
    inputs: 'deployed',
    affine: true,
    allocation: null,
  })
  t.is(report.summary.bytes, plan.bytes)
  const outputs = report.linears.reduce((sum, { rows }) => sum + rows, 0)
  t.is(report.summary.bytes, plain.summary.bytes + 4 * outputs)
  // Those of the first block: what the others read depends on what is before them.
  for (const [i, { name, error, holdOut, certificate }] of report.linears.entries()) {
    const without = plain.linears[i]!.error!
    if (i < 3) t.true(error!.compensated <= without.compensated * (1 + 1e-6), name)
    t.true(error!.bound <= error!.compensated && error!.compensated < error!.quantized, name)
    t.true(holdOut!.compensated < holdOut!.quantized && certificate!.holds, name)
  }
  const config = JSON.parse(readFileSync(join(out, 'adapter_config.json'), 'utf8'))
  t.like(config, { peft_type: 'LORA', r: 8, lora_alpha: 8, lora_bias: true })

  const none = await perplexity(compressed, {})
  const part = await perplexity(compressed, { compensation: out, eoraRank: 2 })
  const all = await perplexity(compressed, { compensation: out })
  t.true(all < part && part < none, `${all} ${part} ${none}`)
  t.is(await perplexity(compressed, { compensation: out, eoraRank: 0 }), none)
  const beside = await t.throwsAsync(() => loadModel(compressed, { adapters: { eora: out } }))
  t.like(beside, { code: 'ERR_ADAPTER_INVALID' })
  t.regex((beside as { hint?: string }).hint ?? '', /compensation/)
  rmSync(join(out, 'factor_centres.safetensors'))
  t.is(await perplexity(compressed, { compensation: out }), all)
  const cut = await t.throwsAsync(() => loadModel(compressed, { compensation: out, eoraRank: 2 }))
  t.like(cut, { code: 'ERR_ADAPTER_INVALID' })
})

test('Linears of one input may share an A, which takes its bytes once', async (t) => {
  const folder = temporaryFolder(t)
  const [compressed, out] = [join(folder, 'w2'), join(folder, 'eora')]
  await compress(TINY, { out: compressed, method: 'rtn', bits: 2, groupSize: 32 })
  const eora = { rank: 8, grouped: true }
  const plan = await compensate(TINY, compressed, { out, calibration, eora, dryRun: true })
  const apart = await compensate(TINY, compressed, { out, calibration, eora: { rank: 8 }, dryRun: true })
  const report = await compensate(TINY, compressed, { out, calibration, eora })
  t.true(report.recipe.eora.grouped)
  t.is(report.summary.bytes, plan.bytes)
  t.true(report.summary.bytes < apart.bytes)
  for (const { name, sharedWith, error, certificate } of report.linears) {
    const others = /[qkv]_proj$/.test(name) ? 2 : /(gate|up)_proj$/.test(name) ? 1 : 0
    t.is(sharedWith?.length ?? 0, others, name)
    t.true(error!.compensated < error!.quantized && certificate!.holds, name)
    for (const other of sharedWith ?? []) {
      t.deepEqual(report.linears.find((linear) => linear.name === other)!.error, error)
    }
  }
  const none = await perplexity(compressed, {})
  const part = await perplexity(compressed, { compensation: out, eoraRank: 2 })
  const all = await perplexity(compressed, { compensation: out })
  t.true(all < part && part < none, `${all} ${part} ${none}`)
  // As an adapter of a request each Linear has its own.
  using model = await loadModel(compressed, { adapters: { eora: out } })
  const beside = await model.perplexity(text, { length: 128, adapter: 'eora' })
  t.true(Math.abs(beside.perplexity / all - 1) < 5e-4, `${beside.perplexity} ${all}`)
})

test('a budget is divided, factors may be codes', async (t) => {
  const folder = temporaryFolder(t)
  const compressed = join(folder, 'w2')
  await compress(TINY, { out: compressed, method: 'rtn', bits: 2, groupSize: 32 })
  const uniform = await compensate(TINY, compressed, { out: join(folder, 'a'), calibration, eora: { rank: 8 } })
  const eora = { meanRank: 8, rankMultiple: 4 }
  const divided = await compensate(TINY, compressed, { out: join(folder, 'b'), calibration, eora })
  t.is(divided.recipe.eora.rank, 32)
  t.true(divided.summary.bytes <= uniform.summary.bytes)
  const allocation = divided.summary.compensation!.allocation!
  t.is(allocation.uniformRank, 8)
  t.is(allocation.chosen === 'allocated', new Set(divided.linears.map(({ rank }) => rank)).size > 1)
  t.is(allocation.ablation, undefined)
  const bytes = uniform.summary.bytes
  const coded = await compensate(TINY, compressed, {
    out: join(folder, 'c'),
    calibration,
    eora: { budgetBytes: bytes, rank: 32, factorBits: 4 },
  })
  t.true(coded.summary.bytes <= bytes)
  t.true(coded.summary.compensation!.meanRank > 8)
  t.true(existsSync(join(folder, 'c', 'factor_scales.safetensors')))
  const [none, plain, fine] = [await perplexity(compressed, {}), await perplexity(compressed, { compensation: join(folder, 'a') }), await perplexity(compressed, { compensation: join(folder, 'c') })]
  t.true(fine < none && fine < plain * 1.02, `${fine} ${plain} ${none}`)
})

test('a budget is divided by what the model is without some of the factors', async (t) => {
  const folder = temporaryFolder(t)
  const [compressed, out] = [join(folder, 'w2'), join(folder, 'eora')]
  const statistics = join(folder, 'statistics.safetensors')
  const options = { out: compressed, method: 'rtn', bits: 2, groupSize: 32, calibration, saveStatistics: statistics } as const
  await compress(TINY, options)
  const eora = { meanRank: 8, rankMultiple: 4, rankWeights: 'ablation' } as const
  const job = compensate(TINY, compressed, { out, calibration, eora })
  const phases = new Set<string>()
  for await (const { phase } of job.progress()) phases.add(phase)
  const report = await job
  const { ablation, uniformRank } = report.summary.compensation!.allocation!
  t.true(phases.has('weigh'), [...phases].join(' '))
  t.is(uniformRank, 8)
  t.is((report.recipe.eora.allocation as { weights: string }).weights, 'ablation')
  t.like(ablation, { fitted: true })
  t.is(ablation!.types.length, LINEARS / ablation!.bands.length)
  for (const { name, cost, removed, factor } of [...ablation!.types, ...ablation!.bands]) {
    t.true(cost > 0 && removed > 0 && factor > 0, name)
  }
  await failsWith(
    t,
    () => compensate(TINY, compressed, { out: join(folder, 'x'), calibration: { file: statistics }, eora }),
    'ERR_OPTION_INVALID',
    'eora.rankWeights',
  )
})

test('a cancelled job goes on to the same factors, saved statistics serve, a baseline proves nothing', async (t) => {
  const folder = temporaryFolder(t)
  const [compressed, statistics] = [join(folder, 'w2'), join(folder, 'statistics.safetensors')]
  const options = { method: 'rtn', bits: 2, groupSize: 32, calibration, saveStatistics: statistics } as const
  await compress(TINY, { ...options, out: compressed })
  const [whole, out] = [join(folder, 'whole'), join(folder, 'out')]
  await compensate(TINY, compressed, { out: whole, calibration, eora: { rank: 4 } })
  const stop = new AbortController()
  const job = compensate(TINY, compressed, { out, calibration, eora: { rank: 4 }, signal: stop.signal })
  for await (const { done } of job.progress()) if (done > 0) stop.abort()
  await Promise.allSettled([job])
  if (!existsSync(out)) await compensate(TINY, compressed, { out, calibration, eora: { rank: 4 } })
  const bytes = (path: string): Buffer => readFileSync(join(path, 'adapter_model.safetensors'))
  t.true(bytes(out).equals(bytes(whole)))

  const baseline = await compensate(TINY, compressed, {
    out: join(folder, 'lorc'),
    calibration: { file: statistics },
    eora: { rank: 4, solver: 'lorc' },
  })
  t.true(baseline.linears.every(({ certificate, holdOut }) => certificate === null && holdOut === null))
  t.like(baseline.summary.compensation, { certified: 0, uncertified: 0, holdOut: null })
  t.true(baseline.summary.compensation!.worstRatio! > 1)
})

test('inputs of both models bring the outputs closer to the original', async (t) => {
  const folder = temporaryFolder(t)
  const [compressed, statistics] = [join(folder, 'w2'), join(folder, 'dense.safetensors')]
  await compress(TINY, { out: compressed, method: 'rtn', bits: 2, groupSize: 32 })
  const solve = (name: string, eora: Partial<CompensateOptions['eora']>, from = calibration as CalibrationOptions) =>
    compensate(TINY, compressed, { out: join(folder, name), calibration: from, eora: { rank: 8, ...eora } })
  const deployed = await solve('deployed', {})
  const none = await solve('none', { inputs: 'mixed', mismatch: 0 })
  const mixed = await solve('mixed', { inputs: 'mixed' })
  t.like(mixed.recipe.eora, { inputs: 'mixed', mismatch: 0.5 })
  const bytes = (name: string): Buffer => readFileSync(join(folder, name, 'adapter_model.safetensors'))
  t.true(bytes('none').equals(bytes('deployed')))
  t.is(deployed.summary.compensation!.denseError, null)
  const [before, after] = [none, mixed].map(({ summary }) => summary.compensation!.denseError!)
  t.true(after!.compensated < before!.quantized)
  for (const { name, denseError, holdOut } of mixed.linears) {
    t.true(denseError!.compensated < denseError!.quantized, name)
    t.is(denseError!.holdOut!.tokens, holdOut!.tokens, name)
  }

  const options = { method: 'rtn', bits: 2, groupSize: 32, calibration, saveStatistics: statistics } as const
  const together = await compress(TINY, { ...options, out: join(folder, 'eora'), eora: { rank: 8, inputs: 'dense' } })
  t.is(together.recipe.eora!.inputs, 'dense')
  await solve('dense', { inputs: 'dense' }, { file: statistics })
  const inside = readFileSync(join(folder, 'eora', 'eora', 'adapter_model.safetensors'))
  t.true(bytes('dense').equals(inside) && !inside.equals(bytes('deployed')))
  await failsWith(t, () => solve('x', {}, { file: statistics }), 'ERR_STATISTICS_MISMATCH')
  await failsWith(t, () => solve('x', { inputs: 'mixed' }, { file: statistics }), 'ERR_OPTION_INVALID', 'eora.inputs')
})

test('what cannot be is refused and leaves nothing', async (t) => {
  const folder = temporaryFolder(t)
  const [compressed, out] = [join(folder, 'w4'), join(folder, 'eora')]
  await compress(TINY, { out: compressed, method: 'rtn', bits: 4, groupSize: 32 })
  const right = { out, calibration, eora: { rank: 4 } }
  const refuses = async (work: () => PromiseLike<unknown>, code: Parameters<typeof failsWith>[2], subject?: string) => {
    await failsWith(t, work, code, subject)
    t.false(existsSync(out) || existsSync(`${out}.partial`))
  }
  await refuses(() => compensate(compressed, TINY, right), 'ERR_QUANTIZATION_UNSUPPORTED')
  await refuses(() => compensate(LLAMA, compressed, right), 'ERR_CHECKPOINT_SHAPE')
  await refuses(() => compensate(TINY, TINY, right), 'ERR_ADAPTER_INVALID')
  await refuses(() => compensate(TINY, compressed, { ...right, eora: {} }), 'ERR_OPTION_INVALID', 'eora.rank')
  for (const [subject, eora] of [
    ['eora.minRank', { rank: 8, minRank: 4 }],
    ['eora.minRank', { meanRank: 8, minRank: 16 }],
    ['eora.meanRank', { meanRank: 0 }],
    ['eora.meanRank', { meanRank: 8, rank: 4 }],
    ['eora.budgetBytes', { budgetBytes: 7 }],
    ['eora.rankWeights', { meanRank: 8, rankWeights: 'depth' as 'ablation' }],
    ['eora.rankWeights', { rank: 8, rankWeights: 'ablation' }],
    ['eora.inputs', { rank: 8, inputs: 'sparse' as 'dense' }],
    ['eora.mismatch', { rank: 8, mismatch: 0.5 }],
    ['eora.mismatch', { rank: 8, inputs: 'dense', mismatch: 0.5 }],
    ['eora.mismatch', { rank: 8, inputs: 'mixed', mismatch: 1.5 }],
    ['eora.mismatch', { rank: 8, inputs: 'mixed', mismatch: -1 }],
  ] as const) {
    await refuses(() => compensate(TINY, compressed, { ...right, eora }), 'ERR_OPTION_INVALID', subject)
  }
  await refuses(
    () => compensate(TINY, compressed, { ...right, eora: { meanRank: 8, budgetBytes: 9 } }),
    'ERR_OPTION_INVALID',
    'eora.budgetBytes',
  )
  await refuses(
    () => compensate(TINY, compressed, { ...right, calibration: {} }),
    'ERR_OPTION_INVALID',
    'calibration.file',
  )
  await failsWith(t, () => loadModel(compressed, { compensation: folder }), 'ERR_ADAPTER_INVALID')
})
