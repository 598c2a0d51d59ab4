import test from 'ava'
import { expectTypeOf } from 'expect-type'
import {
  Checkpoint,
  compensate,
  type CompensationPlan,
  type CompensationReport,
  compress,
  type CompressReport,
  fold,
  type FoldReport,
  type Generation,
  Job,
  KintsugiError,
  loadModel,
  measureSpeed,
  merge,
  type MergePlan,
  type MergeReport,
  metricWeights,
  type Model,
  type PerplexityReport,
  type Piece,
  type Plan,
  type Progress,
  QuantizedLinear,
  remerge,
  type SpeedReport,
} from 'kintsugi'

// Checked by `tsc`, which is part of `npm test`; this function is never called.
export async function publicTypes(model: Model, signal: AbortSignal): Promise<void> {
  expectTypeOf(compress('a', { out: 'b' })).toEqualTypeOf<Job<CompressReport>>()
  expectTypeOf(compress('a', { out: 'b', dryRun: true })).toEqualTypeOf<Job<Plan>>()
  expectTypeOf(await compress('a', { out: 'b', signal })).toEqualTypeOf<CompressReport>()
  expectTypeOf(compress).parameter(0).toEqualTypeOf<string | Checkpoint>()
  // @ts-expect-error the output is required
  compress('a', {})
  // @ts-expect-error there are no codes of 5 bits
  compress('a', { out: 'b', bits: 7 })
  // @ts-expect-error misspelled
  compress('a', { out: 'b', grupSize: 64 })
  compress('a', { out: 'b', groupSize: 'whole', calibration: { text: 'c' }, eora: { rank: 8 } })

  const compensation = { out: 'c', calibration: { text: 'd' }, eora: { rank: 8 } }
  expectTypeOf(compensate('a', 'b', compensation)).toEqualTypeOf<Job<CompensationReport>>()
  expectTypeOf(compensate('a', 'b', { ...compensation, dryRun: true })).toEqualTypeOf<Job<CompensationPlan>>()
  // @ts-expect-error factors have 16, 8 or 4 bits
  compensate('a', 'b', { ...compensation, eora: { rank: 8, factorBits: 3 } })
  compensate('a', 'b', { ...compensation, eora: { rank: 8, inputs: 'mixed', mismatch: 0.5 } })
  // @ts-expect-error there are no such inputs
  compensate('a', 'b', { ...compensation, eora: { rank: 8, inputs: 'both' } })

  expectTypeOf(merge(['a'], { out: 'b' })).toEqualTypeOf<Job<MergeReport>>()
  expectTypeOf(merge(['a'], { out: 'b', dryRun: true })).toEqualTypeOf<Job<MergePlan>>()
  expectTypeOf(remerge('a', { out: 'b', add: { c: 0.5 } })).toEqualTypeOf<Job<MergeReport>>()
  // @ts-expect-error no such method
  merge(['a'], { out: 'b', method: 'mean' })
  expectTypeOf(fold('a', 'b', { out: 'c' })).toEqualTypeOf<Job<FoldReport>>()
  expectTypeOf(measureSpeed({ rows: [1], signal })).toEqualTypeOf<Job<SpeedReport>>()
  expectTypeOf(metricWeights([1])).toEqualTypeOf<number[]>()

  expectTypeOf(loadModel('a')).toEqualTypeOf<Job<Model>>()
  expectTypeOf(loadModel('a')).toExtend<Promise<Model>>()
  expectTypeOf(loadModel('a').progress()).toEqualTypeOf<AsyncGenerator<Progress, void, undefined>>()
  loadModel('a', { precision: 'fast' })
  // @ts-expect-error no such precision
  loadModel('a', { precision: 'int8' })

  expectTypeOf(model.generate('x')).toEqualTypeOf<Generation>()
  for await (const piece of model.generate('x', { stop: 'y', signal })) expectTypeOf(piece).toEqualTypeOf<Piece>()
  expectTypeOf(model.perplexity('x', { length: 512 })).toEqualTypeOf<Job<PerplexityReport>>()
  expectTypeOf(model).toExtend<Disposable & AsyncDisposable>()

  expectTypeOf(QuantizedLinear.quantize).parameter(0).toEqualTypeOf<Float32Array>()
  expectTypeOf<QuantizedLinear['forwardAsync']>().returns.resolves.toEqualTypeOf<Float32Array>()
  // @ts-expect-error made by quantize()
  new QuantizedLinear()

  expectTypeOf(await Checkpoint.open('a')).toEqualTypeOf<Checkpoint>()
  expectTypeOf<KintsugiError['code']>().toExtend<string>()
  // @ts-expect-error codes are a closed list
  expectTypeOf<KintsugiError['code']>().toEqualTypeOf<'ERR_NOVEL'>()
}

test('everything public is there at run time', (t) => {
  const functions = [compress, fold, loadModel, merge, metricWeights, remerge]
  for (const item of [...functions, Checkpoint, Job, KintsugiError, QuantizedLinear]) t.is(typeof item, 'function')
})
