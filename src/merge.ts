import { fromNative, KintsugiError } from './errors.js'
import { Job } from './job.js'
import { native } from './native.js'
import {
  abortSignal,
  boolean,
  checkOptions,
  integer,
  number,
  numbers,
  numbersByName,
  oneOf,
  optional,
  signalOf,
  text,
  texts,
  withDefault,
  withoutUndefined,
} from './options.js'

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

/** How adapters are merged; docs/merging.md says what each does. */
export type MergeMethod = (typeof METHODS)[number]

/**
 * In which coordinates a rule for single elements works: on A and B apart, on the updates ΔW, or on the updates in the
 * shared singular directions of Core Space or KnOTS. It is another operator in each.
 */
export type ElementCoordinates = 'factors' | 'update' | 'core' | 'knots'

/** How adapters are merged. */
export interface MergeOptions {
  /** Folder to write. It must not exist, or be empty. */
  out: string
  /** Merge method, default `lego`. */
  method?: MergeMethod
  /** Rank of the result, default the largest rank of the adapters. `cat` has the sum of the ranks, `linear` theirs. */
  rank?: number
  /** Instead of a fixed rank: as few terms as hold this share of the energy of the exact sum; `rank` is then the most. */
  energy?: number
  /** What the update of each adapter is multiplied with, in the order of the adapters; default 1 for each. */
  weights?: number[]
  /** Rank of the modules in the file: one for all (`uniform`, the default), one that vLLM knows, or each its own. */
  padding?: 'uniform' | 'vllm' | 'none'
  /** Number type of the factors; `auto` (the default) is that of the adapters, f32 where they differ. */
  factorType?: 'auto' | 'bf16' | 'f16' | 'f32'
  /** TIES, DARE, magnitude pruning, KnOTS: coordinates; default `update`, for `knots` `knots`. */
  coordinates?: ElementCoordinates
  /** Pruning methods: share of the elements that stay, default 0.5. */
  density?: number
  /** TIES: what decides the sign of an element, default `total`. */
  signElection?: 'total' | 'frequency'
  /** DARE and LEGO: seed, default 0. */
  seed?: number
  /** LEGO: starts of k-means, default 10. */
  restarts?: number
  /** LEGO: most iterations of a start, default 300. */
  iterations?: number
  /** LEGO: units as they were trained (`raw`, the default), or the terms of the singular value decomposition. */
  gauge?: 'raw' | 'svd'
  /** LEGO: cluster by direction, both halves of a unit brought to norm 1; default false. */
  normalize?: boolean
  /** LEGO: give a centre the mean largest element of its members; default true. */
  parameterReweighting?: boolean
  /** LEGO: multiply the update by √(reference rank / rank); default true. */
  outputReweighting?: boolean
  /** LEGO: the reference rank, default the mean rank of the adapters. */
  referenceRank?: number
  /** What is done at the end: nothing, one best factor for the update, or the best B for its A; default `method`. */
  scale?: 'method' | 'closed-form' | 'refit'
  /** Measure what was kept of each adapter; default true. */
  report?: boolean
  /** Merge adapters whose configs name different base models; default false. */
  allowDifferentBases?: boolean
  /**
   * Statistics of the base model that `compress` has saved (`saveStatistics`): errors count by what they do to the
   * outputs. `svd` reads them, and the `scale` of the methods that approximate; see docs/merging.md.
   */
  calibration?: string
  /**
   * The compensation of a compressed base (its folder `eora/`), which becomes part of the result: one adapter to serve on
   * the compressed model without its own compensation. Its rank comes on top, and its factors stay as they are where the
   * stored type can hold them (`factorType` as theirs, a scaling that is a power of two), else they are rounded once.
   */
  compensation?: string
  /** With `compensation`: cut both together to this rank, the best one for the outputs with `calibration`. */
  totalRank?: number
  /**
   * Modules that adapters hold whole (`modules_to_save` of peft): carried over where one has them or all agree (`equal`,
   * the default), averaged by weight (`mean`), or refused. A module that one adapter has whole and another has factors for
   * is refused: peft would leave the factors out.
   */
  modulesToSave?: 'equal' | 'mean' | 'refuse'
  /** Check everything and return the plan; nothing is written. */
  dryRun?: boolean
  /** Aborting it cancels the job. */
  signal?: AbortSignal
}

/** What was asked, with every default filled in. */
export interface MergeRecipe {
  adapters: string[]
  weights: number[]
  out: string
  method: MergeMethod
  options: {
    rank: null | { fixed: number } | { energy: { share: number; most: number } }
    coordinates: ElementCoordinates | null
    density: number
    signElection: string
    seed: number
    restarts: number
    iterations: number
    gauge: string
    normalize: boolean
    parameterReweighting: boolean
    outputReweighting: boolean
    referenceRank: number | null
    scale: string
    report: boolean
  }
  factorType: string | null
  padding: string
  allowDifferentBases: boolean
  calibration: string | null
  compensation: string | null
  totalRank: number | null
  modulesToSave: string
}

/** What will be merged. */
export interface MergePlan {
  recipe: MergeRecipe
  /** The base model that the result names: that of the adapters, or of the compensation. */
  baseModel: string | null
  factorType: string
  modules: PlannedMerge[]
  /** Tensors of modules that are saved whole. */
  wholeTensors: string[]
  /** Bytes of tensors that will be written; an upper bound with an energy target. */
  bytes: number
  sourceBytes: number
  /** Estimate of the largest working set. */
  memoryBytes: number
}

/** One module of a {@link MergePlan}; its update is `[outFeatures, inFeatures]`. */
export interface PlannedMerge {
  name: string
  outFeatures: number
  inFeatures: number
  /** Indices of the adapters that have it. */
  adapters: number[]
  /** Their ranks. */
  ranks: number[]
  /** Rank of the compensation that is joined, 0 without. */
  compensationRank: number
  /** Whether the calibration has statistics of its inputs. */
  weighted: boolean
  /** Most that the rank of the result can be. */
  rank: number
}

/** What a merge did; `report.json` in the folder that was written. */
export interface MergeReport {
  recipe: MergeRecipe
  summary: MergeSummary
  modules: MergedModule[]
}

/** The whole adapter. */
export interface MergeSummary {
  modules: number
  /** `r` of the result. */
  rank: number
  /** Bytes of the weights file. */
  bytes: number
  sourceBytes: number
  /**
   * ‖M − T‖ / ‖T‖ over all modules, T the exact weighted sum of the adapters and M their merge, before a compensation is
   * joined and both are cut to `totalRank`; `null` without report.
   */
  error: number | null
  /** The same for the outputs, over the modules with statistics; `null` without report or calibration. */
  weightedError: number | null
  /**
   * What cutting to `totalRank` costs over all modules, ‖J − (E + M)‖ / ‖E + M‖ for the compensation E; `null` without
   * `totalRank`.
   */
  joined: {
    error: number
    /** The same for the outputs, over the modules with statistics; `null` without calibration. */
    weightedError: number | null
  } | null
  adapters: AdapterShare[]
  seconds: number
  /** Largest resident set of the process so far; `null` where the system does not tell. */
  peakMemoryBytes: number | null
}

/** What is left of one adapter, before a cut to `totalRank`. */
export interface AdapterShare {
  path: string
  weight: number
  /** Modules that it has factors for. */
  modules: number
  /** Of scalings, shapes, a sample of its factors and of its whole modules: what {@link remerge} holds it against. */
  fingerprint: string
  /** Share of its energy in the row and column spaces of the result, from 0 to 1; `null` without report. */
  retained: number | null
  /** The multiple of it in the result: its weight, where the sum is exact and the adapters are unrelated. */
  multiple: number | null
}

/** One module of a {@link MergeReport}; its update is `[outFeatures, inFeatures]`. */
export interface MergedModule {
  name: string
  outFeatures: number
  inFeatures: number
  /** Indices of the adapters that have it. */
  adapters: number[]
  rank: number
  /** LEGO: units behind each term. */
  clusterSizes: number[]
  /** LEGO: what each centre was multiplied with. */
  scales: number[]
  /** What the closed-form scale multiplied the update with, else 1. */
  scale: number
  /** What the merge of the adapters kept, a compensation aside. */
  kept: ModuleKept | null
  /** How a compensation was joined; `null` without. */
  joined: {
    compensationRank: number
    mergedRank: number
    /** What cutting both to the total rank costs, relative; 0 where both are kept. */
    error: number
    /** ‖E + M‖, E the compensation and M the merged adapters. */
    sumNorm: number
    /** `error` for the outputs; `null` without calibration. */
    weightedError: number | null
    /** `sumNorm` for the outputs; `null` without calibration. */
    weightedSumNorm: number | null
  } | null
}

/** What was kept of the exact weighted sum T and of its sources. */
export interface ModuleKept {
  /** ‖M − T‖ / ‖T‖. */
  error: number
  cosine: number | null
  /** ‖M‖ / ‖T‖. */
  normRatio: number | null
  /** ‖T‖. */
  sumNorm: number
  /** ‖(M − T) S^½‖ / ‖T S^½‖, S the second moment of the inputs: the error of the outputs; `null` without calibration. */
  weightedError: number | null
  /** ‖T S^½‖. */
  weightedSumNorm: number | null
  /** In the order of `adapters` of the module. */
  sources: { retained: number; multiple: number; norm: number }[]
  /** Share of common directions of each pair, of outputs and of inputs. */
  overlaps: { first: number; second: number; outputs: number; inputs: number }[]
}

const schema = {
  out: text,
  method: withDefault(oneOf(METHODS), 'lego'),
  rank: optional(integer({ min: 1, max: 2 ** 16 })),
  energy: optional(number({ min: Number.MIN_VALUE, max: 1 })),
  weights: optional(numbers),
  padding: withDefault(oneOf(['uniform', 'vllm', 'none']), 'uniform'),
  factorType: withDefault(oneOf(['auto', 'bf16', 'f16', 'f32']), 'auto'),
  coordinates: optional(oneOf(['factors', 'update', 'core', 'knots'])),
  density: withDefault(number({ min: Number.MIN_VALUE, max: 1 }), 0.5),
  signElection: withDefault(oneOf(['total', 'frequency']), 'total'),
  seed: withDefault(integer({ min: 0, max: 2 ** 32 - 1 }), 0),
  restarts: withDefault(integer({ min: 1, max: 10_000 }), 10),
  iterations: withDefault(integer({ min: 1, max: 100_000 }), 300),
  gauge: withDefault(oneOf(['raw', 'svd']), 'raw'),
  normalize: withDefault(boolean, false),
  parameterReweighting: withDefault(boolean, true),
  outputReweighting: withDefault(boolean, true),
  referenceRank: optional(number({ min: Number.MIN_VALUE })),
  scale: withDefault(oneOf(['method', 'closed-form', 'refit']), 'method'),
  report: withDefault(boolean, true),
  allowDifferentBases: withDefault(boolean, false),
  calibration: optional(text),
  compensation: optional(text),
  totalRank: optional(integer({ min: 1, max: 2 ** 16 })),
  modulesToSave: withDefault(oneOf(['equal', 'mean', 'refuse']), 'equal'),
  dryRun: withDefault(boolean, false),
  signal: optional(abortSignal),
}

/**
 * Merges LoRA adapters of one base model into one, module by module, and writes a PEFT folder with scaling 1, with
 * `report.json` and the same as a picture, `report.svg`. The base model is not needed. Adapters are PEFT folders; ranks,
 * scalings and targets may differ. The folder appears whole or not at all, and what is merged does not depend on the
 * order of the adapters.
 */
export function merge(adapters: readonly string[], options: MergeOptions & { dryRun: true }): Job<MergePlan>
export function merge(adapters: readonly string[], options: MergeOptions & { dryRun?: false }): Job<MergeReport>
export function merge(adapters: readonly string[], options: MergeOptions): Job<MergeReport | MergePlan>
export function merge(adapters: readonly string[], options: MergeOptions): Job<MergeReport | MergePlan> {
  return new Job(() => {
    const folders = texts(adapters, 'adapters')
    const { signal: _, weights, rank, energy, coordinates, referenceRank, totalRank, ...given } = checkOptions(
      options,
      schema,
    )
    if (folders.length === 0) throw wrong('adapters', 'there is nothing to merge', 'Give at least one adapter folder.')
    if (weights && weights.length !== folders.length) {
      const message = `${weights.length} weights for ${folders.length} adapters`
      throw wrong('weights', message, 'Give one weight for each adapter.')
    }
    const request = {
      ...withoutUndefined(given),
      adapters: folders,
      weights: weights ?? folders.map(() => 1),
      rank: rank ?? 0,
      energy: energy ?? 0,
      coordinates: coordinates ?? 'auto',
      referenceRank: referenceRank ?? 0,
      totalRank: totalRank ?? 0,
    }
    const control = new (native().BindingControl)()
    return { control, result: native().merge(request, control) as Promise<MergeReport | MergePlan> }
  }, [signalOf(options)])
}

/** What becomes of an earlier merge. */
export interface RemergeOptions {
  /** Folder to write. It must not exist, or be empty. */
  out: string
  /** Adapters that join, by folder, with their weights. */
  add?: Record<string, number>
  /** Adapters that leave: their folders as the earlier report names them, or the last part of these. */
  remove?: string[]
  /** Check everything and return the plan; nothing is written. */
  dryRun?: boolean
  /** Aborting it cancels the job. */
  signal?: AbortSignal
}

const remergeSchema = {
  out: text,
  add: withDefault(numbersByName, {}),
  remove: withDefault(texts, []),
  dryRun: withDefault(boolean, false),
  signal: optional(abortSignal),
}

/**
 * Merges anew what an earlier merge has merged, with some adapters more or less: by the recipe in its `report.json`, from
 * its sources, which must still be where they were. The weights and the config that are written are those of a merge that
 * never knew the removed ones, byte for byte; the weights of the other adapters stay as they were.
 *
 * The merge, not a dry run, holds each adapter that stays against its fingerprint: scalings, shapes, a sample of the factors
 * and of the modules that are saved whole. The folder of a compensation and the file of a calibration are taken as they are.
 */
export function remerge(merged: string, options: RemergeOptions & { dryRun: true }): Job<MergePlan>
export function remerge(merged: string, options: RemergeOptions & { dryRun?: false }): Job<MergeReport>
export function remerge(merged: string, options: RemergeOptions): Job<MergeReport | MergePlan>
export function remerge(merged: string, options: RemergeOptions): Job<MergeReport | MergePlan> {
  return new Job(() => {
    const { signal: _, add, ...given } = checkOptions(options, remergeSchema)
    const request = { ...given, merged: text(merged, 'merged'), add: Object.keys(add), weights: Object.values(add) }
    const control = new (native().BindingControl)()
    return { control, result: native().remerge(request, control) as Promise<MergeReport | MergePlan> }
  }, [signalOf(options)])
}

/** How weights are made of one figure per adapter. */
export interface MetricWeightOptions {
  /** Whether the figures are losses; default false. */
  lowerIsBetter?: boolean
  /** `softmax` (default): exp(±metric / temperature) / Σ. `proportional`: metric^±power / Σ, for figures above 0. */
  formula?: 'softmax' | 'proportional'
  /** Of softmax, default 1: the larger, the more equal the weights. */
  temperature?: number
  /** Of proportional, default 1: 0 makes the weights equal. */
  power?: number
}

const metricSchema = {
  lowerIsBetter: withDefault(boolean, false),
  formula: withDefault(oneOf(['softmax', 'proportional']), 'softmax'),
  temperature: withDefault(number({ min: Number.MIN_VALUE }), 1),
  power: withDefault(number({ min: 0 }), 1),
}

/**
 * Weights for {@link merge} from a figure that each adapter has, an accuracy or a loss. They sum to 1.
 *
 * @throws KintsugiError `ERR_OPTION_INVALID`, `ERR_OPTION_UNKNOWN`
 */
export function metricWeights(metrics: readonly number[], options: MetricWeightOptions = {}): number[] {
  const { lowerIsBetter, formula, temperature, power } = checkOptions(options, metricSchema)
  try {
    const parameter = formula === 'softmax' ? temperature : power
    return native().weightsFromMetrics(numbers(metrics, 'metrics'), lowerIsBetter, formula, parameter)
  } catch (error) {
    throw fromNative(error)
  }
}

function wrong(subject: string, message: string, hint: string): KintsugiError {
  return new KintsugiError({ code: 'ERR_OPTION_INVALID', message, subject, hint })
}
