import { existsSync, readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'

import test from 'ava'
import fc from 'fast-check'
import { compress, fold, loadModel, merge, type MergeReport, metricWeights, type Progress, remerge } from 'kintsugi'

import { native } from '../src/native.js'
import {
  asset,
  failsWith,
  LLAMA,
  readSafetensors,
  ROOT,
  SHAKESPEARE,
  SHORT_CALIBRATION,
  temporaryFolder,
  textSlice,
} from './fixtures.js'

const PYTHON = asset('adapters/python')
const TEXT = asset('text/eval-shakespeare.txt')
const VECTORS = join(ROOT, '__test__/vectors/merge')
const MODULES = 56
const METHODS = [
  'lego',
  'lego-gauge-free',
  'cat',
  'svd',
  'linear',
  'ties',
  'dare-linear',
  'dare-ties',
  'magnitude-prune',
  'knots',
  'tsv',
  'iso-c',
] as const

/** The options that only some methods read. */
const EVERY_OPTION = {
  coordinates: 'core',
  density: 0.4,
  signElection: 'frequency',
  seed: 3,
  restarts: 2,
  iterations: 50,
  gauge: 'svd',
  normalize: true,
  parameterReweighting: false,
  outputReweighting: false,
  referenceRank: 4,
} as const

test('svd: report, folder and progress', async (t) => {
  const out = join(temporaryFolder(t), 'both')
  const job = merge([SHAKESPEARE, PYTHON], { out, method: 'svd', rank: 8, weights: [0.5, 0.5] })
  const seen: Progress[] = []
  for await (const reading of job.progress()) seen.push(reading)
  const { recipe, summary, modules } = await job

  t.is(seen.at(-1)!.done, MODULES)
  t.like(recipe, { adapters: [SHAKESPEARE, PYTHON], weights: [0.5, 0.5], method: 'svd', out })
  t.deepEqual(recipe.options.rank, { fixed: 8 })
  t.like(summary, { modules: MODULES, rank: 8 })
  t.is(modules.length, MODULES)
  for (const { name, rank, adapters, kept } of modules) {
    t.is(rank, 8, name)
    t.deepEqual(adapters, [0, 1])
    t.true(kept!.error > 0 && kept!.error < 1, name)
    // The best approximation is a projection: ‖M − T‖² = ‖T‖² − ‖M‖².
    t.true(Math.abs(kept!.error ** 2 + kept!.normRatio! ** 2 - 1) < 1e-4, name)
    t.is(kept!.overlaps.length, 1)
    for (const { retained } of kept!.sources) t.true(retained > 0 && retained <= 1, name)
  }
  t.true(summary.adapters.every(({ retained }) => retained! > 0.3 && retained! < 1))
  const files = ['adapter_config.json', 'adapter_model.safetensors', 'report.json', 'report.svg']
  t.deepEqual(readdirSync(out).sort(), files)
  t.deepEqual(JSON.parse(readFileSync(join(out, 'report.json'), 'utf8')) as MergeReport, { recipe, summary, modules })
  const config = JSON.parse(readFileSync(join(out, 'adapter_config.json'), 'utf8'))
  t.like(config, { peft_type: 'LORA', r: 8, lora_alpha: 8, use_rslora: false, rank_pattern: {}, alpha_pattern: {} })
  t.deepEqual(config.target_modules.length, 7)
  const { header } = readSafetensors(join(out, 'adapter_model.safetensors'))
  t.is(Object.keys(header).length, 2 * MODULES)
})

test('a merged adapter runs as the sum of its sources does', async (t) => {
  const folder = temporaryFolder(t)
  const text = textSlice(TEXT, 12_000)
  const [half, whole] = [join(folder, 'half'), join(folder, 'whole')]
  // One adapter at weight 1/2 twice is the adapter.
  await merge([SHAKESPEARE, SHAKESPEARE], { out: half, method: 'cat', weights: [0.5, 0.5] })
  await merge([SHAKESPEARE, PYTHON], { out: whole, method: 'lego', rank: 12 })
  using model = await loadModel(LLAMA, { precision: 'f32', adapters: { shakespeare: SHAKESPEARE, half, whole } })
  const perplexity = async (adapter?: string): Promise<number> =>
    (await model.perplexity(text, { length: 128, ...(adapter && { adapter }) })).perplexity
  const [base, alone, twice, lego] = [
    await perplexity(),
    await perplexity('shakespeare'),
    await perplexity('half'),
    await perplexity('whole'),
  ]
  t.true(Math.abs(twice / alone - 1) < 1e-4, `${twice} ${alone}`)
  t.true(alone < 0.75 * base)
  t.true(lego < base, `${lego} ${base}`)
})

test('folding is running with the adapter', async (t) => {
  const out = join(temporaryFolder(t), 'folded')
  const text = textSlice(TEXT, 12_000)
  const report = await fold(LLAMA, SHAKESPEARE, { out, elementType: 'f32' })
  t.is(report.modules, MODULES)
  using folded = await loadModel(out, { precision: 'f32' })
  using beside = await loadModel(LLAMA, { precision: 'f32', adapters: { shakespeare: SHAKESPEARE } })
  const { perplexity } = await folded.perplexity(text, { length: 128 })
  const expected = await beside.perplexity(text, { length: 128, adapter: 'shakespeare' })
  t.true(Math.abs(perplexity / expected.perplexity - 1) < 1e-4, `${perplexity} ${expected.perplexity}`)
  await failsWith(t, () => fold(LLAMA, SHAKESPEARE, { out }), 'ERR_OUTPUT_NOT_EMPTY', out)
})

test('every method runs, also on adapters of other ranks, files and targets', async (t) => {
  const folder = temporaryFolder(t)
  const equal = ['first', 'second', 'third'].map((name) => join(VECTORS, name))
  const mixed = ['first', 'small', 'stable', 'patterns', 'embedding', 'binary'].map((name) => join(VECTORS, name))
  for (const method of METHODS) {
    const report = await merge(equal, { out: join(folder, method), method, ...EVERY_OPTION })
    t.like(report.recipe.options, EVERY_OPTION)
    t.true(report.summary.error! >= 0, method)
    if (method === 'linear') continue
    const { summary } = await merge(mixed, { out: join(folder, `${method}-mixed`), method, padding: 'vllm' })
    t.is(summary.modules, 5)
  }
  await failsWith(t, () => merge(mixed, { out: join(folder, 'x'), method: 'linear' }), 'ERR_OPTION_INVALID', /proj/)
  t.false(existsSync(join(folder, 'x')))
})

test('an adapter for a compressed model holds its compensation, and statistics weigh errors', async (t) => {
  const folder = temporaryFolder(t)
  const path = (name: string): string => join(folder, name)
  const text = textSlice(TEXT, 8_000)
  const [model, calibration] = [path('w3'), path('statistics.safetensors')]
  const taken = { calibration: SHORT_CALIBRATION, saveStatistics: calibration, eora: { rank: 8 } }
  await compress(LLAMA, { out: model, method: 'rtn', bits: 3, groupSize: 64, ...taken })
  const compensation = join(model, 'eora')
  const alone = await merge([SHAKESPEARE, PYTHON], { out: path('alone'), method: 'svd', rank: 8, calibration })
  const joined = await merge([SHAKESPEARE, PYTHON], {
    ...{ out: path('joined'), method: 'svd', rank: 8, calibration, compensation },
  })
  t.true(alone.summary.weightedError! > 0 && alone.summary.weightedError! < 1)
  t.is(joined.summary.weightedError, alone.summary.weightedError)
  t.is(joined.summary.rank, 16)
  t.true(joined.modules.every((module) => module.joined!.compensationRank === 8 && module.joined!.error === 0))
  const cut = await merge([SHAKESPEARE, PYTHON], {
    ...{ out: path('cut'), method: 'cat', totalRank: 12, padding: 'vllm', calibration, compensation },
  })
  t.is(cut.summary.rank, 16)
  t.true(cut.modules.every(({ rank, joined }) => rank === 12 && joined!.weightedError! < joined!.error))
  // What the sum lost is nothing, what the cut cost is not.
  t.true(cut.summary.error! < 1e-6 && cut.summary.joined!.error > 0.01)
  t.true(cut.summary.joined!.weightedError! > 0 && cut.summary.joined!.weightedError! < cut.summary.joined!.error)
  t.is(joined.summary.joined, null)

  using beside = await loadModel(model, { precision: 'f32', adapters: { alone: path('alone') } })
  using within = await loadModel(model, { precision: 'f32', compensation: false, adapters: { joined: path('joined') } })
  const apart = await beside.perplexity(text, { length: 128, adapter: 'alone' })
  const together = await within.perplexity(text, { length: 128, adapter: 'joined' })
  t.true(Math.abs(together.perplexity / apart.perplexity - 1) < 1e-5, `${together.perplexity} ${apart.perplexity}`)

  const out = path('x')
  await failsWith(t, () => merge([PYTHON], { out, method: 'lego', calibration }), 'ERR_OPTION_INVALID', 'calibration')
  await failsWith(t, () => merge([PYTHON], { out, method: 'svd', totalRank: 4 }), 'ERR_OPTION_INVALID', 'totalRank')
  const wrong = { out, method: 'svd' as const, calibration: join(model, 'model.safetensors') }
  await failsWith(t, () => merge([PYTHON], wrong), 'ERR_STATISTICS_MISMATCH', wrong.calibration)
  t.false(existsSync(out))
})

test('sources join a merge and leave it', async (t) => {
  const folder = temporaryFolder(t)
  const path = (name: string): string => join(folder, name)
  const bytes = (name: string): Buffer => readFileSync(join(path(name), 'adapter_model.safetensors'))
  const options = { method: 'lego' as const, rank: 6, seed: 3, weights: [1, 0.5] }
  await merge([SHAKESPEARE, PYTHON], { ...options, out: path('both') })
  const alone = await remerge(path('both'), { out: path('alone'), remove: ['python'] })
  t.deepEqual(alone.recipe.adapters, [SHAKESPEARE])
  const plan = await remerge(path('alone'), { out: path('x'), add: { [PYTHON]: 0.5 }, dryRun: true })
  t.deepEqual(plan.recipe.weights, [1, 0.5])
  await remerge(path('alone'), { out: path('again'), add: { [PYTHON]: 0.5 } })
  t.deepEqual(bytes('again'), bytes('both'))
  await failsWith(t, () => remerge(path('both'), { out: path('x') }), 'ERR_OPTION_INVALID', 'add')
  await failsWith(t, () => remerge(path('both'), { out: path('x'), remove: ['legal'] }), 'ERR_OPTION_INVALID', 'remove')
  const nan = { out: path('x'), add: { [PYTHON]: Number.NaN } }
  await failsWith(t, () => remerge(path('both'), nan), 'ERR_OPTION_INVALID', `add.${PYTHON}`)
  await failsWith(t, () => remerge(SHAKESPEARE, { out: path('x'), remove: ['a'] }), 'ERR_ADAPTER_INVALID', /report.json/)
  t.false(existsSync(path('x')))
})

test('the table of methods is that of the engine, and docs have a row for each', (t) => {
  const methods = native().mergeMethods() as {
    name: string
    summary: string
    options: string[]
    weighsInputs: boolean
  }[]
  t.deepEqual(
    methods.map(({ name }) => name),
    [...METHODS],
  )
  const docs = readFileSync(join(ROOT, 'docs/merging.md'), 'utf8')
  for (const { name, summary, options } of methods) {
    t.regex(docs, new RegExp(`^\\| [^|]*\`${name}\``, 'm'))
    t.not(summary, '')
    t.true(options.every((option) => option in EVERY_OPTION), name)
  }
  const weighing = methods.filter(({ weighsInputs }) => weighsInputs).map(({ name }) => name)
  t.deepEqual(weighing, ['svd'])
})

test('a dry run plans and writes nothing', async (t) => {
  const folder = temporaryFolder(t)
  const plan = await merge([SHAKESPEARE, PYTHON], { out: join(folder, 'x'), method: 'cat', dryRun: true })
  t.like(plan, { baseModel: 'llama-7m', factorType: 'f32', wholeTensors: [] })
  t.is(plan.modules.length, MODULES)
  t.true(plan.modules.every(({ rank, ranks }) => rank === 16 && ranks.join() === '8,8'))
  t.true(plan.memoryBytes > 0)
  t.deepEqual(readdirSync(folder), [])
})

test('wrong options are refused before anything runs', async (t) => {
  const out = join(temporaryFolder(t), 'x')
  const both = [SHAKESPEARE, PYTHON]
  const refused = (options: object, subject: string, code = 'ERR_OPTION_INVALID' as const) =>
    failsWith(t, () => merge(both, { out, ...options }), code, subject)
  await refused({ method: 'legos' }, 'method')
  await refused({ rank: 0 }, 'rank')
  await refused({ energy: 2 }, 'energy')
  await refused({ weights: [1] }, 'weights')
  await refused({ weights: [1, Number.NaN] }, 'weights[1]')
  await refused({ density: 0 }, 'density')
  await refused({ coordinates: 'polar' }, 'coordinates')
  await refused({ padding: 'all' }, 'padding')
  await refused({ modulesToSave: 'first' }, 'modulesToSave')
  await refused({ totalRank: 0 }, 'totalRank')
  await refused({ calibration: '' }, 'calibration')
  await failsWith(t, () => merge(both, { out, rnak: 4 } as never), 'ERR_OPTION_UNKNOWN', 'rnak')
  await failsWith(t, () => merge([], { out }), 'ERR_OPTION_INVALID', 'adapters')
  await failsWith(t, () => merge([join(out, 'missing')], { out }), 'ERR_ADAPTER_INVALID', /missing/)
  const other = [SHAKESPEARE, join(VECTORS, 'first')]
  await failsWith(t, () => merge(other, { out, method: 'svd' }), 'ERR_ADAPTER_INVALID', /first/)
  t.false(existsSync(out))
})

test('an aborted merge leaves nothing', async (t) => {
  const folder = temporaryFolder(t)
  const abort = new AbortController()
  const job = merge([SHAKESPEARE, PYTHON], { out: join(folder, 'x'), method: 'svd', signal: abort.signal })
  abort.abort(new Error('enough'))
  await t.throwsAsync(async () => job, { message: 'enough' })
  t.deepEqual(readdirSync(folder), [])
})

test('weights from metrics sum to 1 and follow the metric', (t) => {
  t.deepEqual(metricWeights([1, 3], { formula: 'proportional' }), [0.25, 0.75])
  fc.assert(
    fc.property(
      fc.array(fc.double({ min: 0.01, max: 100, noNaN: true }), { minLength: 1, maxLength: 8 }),
      fc.boolean(),
      fc.constantFrom('softmax' as const, 'proportional' as const),
      (metrics, lowerIsBetter, formula) => {
        const weights = metricWeights(metrics, { lowerIsBetter, formula })
        const best = metrics.indexOf(lowerIsBetter ? Math.min(...metrics) : Math.max(...metrics))
        const sum = weights.reduce((total, weight) => total + weight, 0)
        return Math.abs(sum - 1) < 1e-12 && weights[best] === Math.max(...weights)
      },
    ),
  )
  t.throws(() => metricWeights([]), { code: 'ERR_OPTION_INVALID' })
  t.throws(() => metricWeights([Number.NaN, 1]), { code: 'ERR_OPTION_INVALID' })
  t.throws(() => metricWeights([-1], { formula: 'proportional' }), { code: 'ERR_OPTION_INVALID' })
})
