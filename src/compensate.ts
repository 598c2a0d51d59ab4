import {
  type CalibrationOptions,
  calibrationRequest,
  calibrationSchema,
  type CalibrationShare,
  type RecipeCalibration,
} from './calibration.js'
import { type Checkpoint, folderOf } from './checkpoint.js'
import type { Backend, CompressedLinear, DiskPlan, MemoryPlan, Precision } from './compress.js'
import { type CompensationSummary, type EoraOptions, type EoraRecipe, eoraRequest, eoraSchema } from './eora.js'
import { Job } from './job.js'
import { native } from './native.js'
import {
  abortSignal,
  boolean,
  checkOptions,
  integer,
  oneOf,
  optional,
  signalOf,
  text,
  withDefault,
  withoutUndefined,
} from './options.js'

/** How a compressed checkpoint is compensated. */
export interface CompensateOptions {
  /** PEFT folder to write. It must not exist, or be empty. */
  out: string
  /** What the model reads while the statistics of its inputs are taken. */
  calibration: CalibrationOptions
  /** What is solved, and how. */
  eora: EoraOptions
  /** Bytes of memory that the job may take; by default what is available. Changes no bit of the output. */
  memory?: number
  /** Arithmetic of the forward passes, default `exact`. */
  precision?: Exclude<Precision, 'fast'>
  /** What runs the forward passes, default `cpu`. */
  backend?: Backend
  /** Discard what an interrupted job left in `OUT.partial` instead of going on with it; default false. */
  fresh?: boolean
  /** Check everything and return the plan; nothing runs, nothing is written. */
  dryRun?: boolean
  /** Aborting it cancels the job. */
  signal?: AbortSignal
}

/** What was asked, with every default filled in. */
export interface CompensateRecipe {
  original: string
  compressed: string
  out: string
  calibration: RecipeCalibration
  eora: EoraRecipe
}

/** What a compensation will do. */
export interface CompensationPlan {
  recipe: CompensateRecipe
  architecture: string
  linears: PlannedCompensation[]
  /** Most bytes that the factors take as they are stored. */
  bytes: number
  memory: MemoryPlan
  disk: DiskPlan
}

/** One Linear of a {@link CompensationPlan}; its weight is `[rows, columns]` = `[outFeatures, inFeatures]`. */
export interface PlannedCompensation {
  name: string
  rows: number
  columns: number
  /** Most that the rank can be. */
  rank: number
  /** Bits of the factors. */
  storedBits: number
}

/** What a compensation did; `report.json` in the folder that was written. */
export interface CompensationReport {
  recipe: CompensateRecipe
  summary: {
    /** Bytes of the factors as they are stored, an A that Linears share once. */
    bytes: number
    /** Bits of the factors over the number of weights that they compensate. */
    bitsPerWeight: number
    calibrationTokens: number
    /** The same by source. */
    calibration: CalibrationShare[]
    /** Means over the Linears of their relative errors. */
    meanError: null | { quantized: number; compensated: number }
    compensation: null | CompensationSummary
    seconds: number
    /** Where the time went. */
    phases: Record<'read' | 'calibrate' | 'compress' | 'compensate' | 'write', number>
    /** Largest resident set of the process so far; `null` where the system does not tell. */
    peakMemoryBytes: number | null
  }
  linears: CompressedLinear[]
}

const schema = {
  out: text,
  calibration: calibrationSchema,
  eora: eoraSchema,
  memory: optional(integer({ min: 1 })),
  precision: withDefault(oneOf(['f32', 'exact']), 'exact'),
  backend: withDefault(oneOf(['cpu', 'candle']), 'cpu'),
  fresh: withDefault(boolean, false),
  dryRun: withDefault(boolean, false),
  signal: optional(abortSignal),
}

/**
 * Compensates a checkpoint that is compressed already, by whomever and in whatever format: solves, block by block, the
 * factors that repair its outputs best (EoRA), and writes them as a PEFT folder with `report.json`; no checkpoint is
 * changed. A job that is cancelled or killed goes on behind the last block that was finished.
 *
 * `loadModel(compressed, { compensation: out })` puts the factors into the products; PEFT, transformers and vLLM load
 * the folder as an adapter.
 */
export function compensate(
  original: string | Checkpoint,
  compressed: string | Checkpoint,
  options: CompensateOptions & { dryRun: true },
): Job<CompensationPlan>
export function compensate(
  original: string | Checkpoint,
  compressed: string | Checkpoint,
  options: CompensateOptions & { dryRun?: false },
): Job<CompensationReport>
export function compensate(
  original: string | Checkpoint,
  compressed: string | Checkpoint,
  options: CompensateOptions,
): Job<CompensationReport | CompensationPlan>
export function compensate(
  original: string | Checkpoint,
  compressed: string | Checkpoint,
  options: CompensateOptions,
): Job<CompensationReport | CompensationPlan> {
  return new Job(() => {
    const folders = { original: folderOf(original, 'original'), compressed: folderOf(compressed, 'compressed') }
    const { calibration, eora, signal: _, ...given } = checkOptions(options, schema)
    const request = withoutUndefined({
      ...folders,
      ...given,
      calibration: calibrationRequest(calibration),
      eora: eoraRequest(eora),
    })
    const control = new (native().BindingControl)()
    return { control, result: native().compensate(request, control) as Promise<CompensationReport | CompensationPlan> }
  }, [signalOf(options)])
}
