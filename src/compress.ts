import {
  type CalibrationOptions,
  calibrationRequest,
  calibrationSchema,
  type CalibrationShare,
  type RecipeCalibration,
} from './calibration.js'
import { type Checkpoint, folderOf } from './checkpoint.js'
import {
  type Certificate,
  type CompensationSummary,
  type DenseError,
  type EoraOptions,
  type EoraRecipe,
  eoraRequest,
  eoraSchema,
  type HoldOutError,
} from './eora.js'
import { KintsugiError } from './errors.js'
import { Job } from './job.js'
import { native } from './native.js'
import {
  abortSignal,
  boolean,
  checkOptions,
  groupSize,
  integer,
  listOf,
  number,
  object,
  oneOf,
  optional,
  signalOf,
  text,
  withDefault,
  withoutUndefined,
} from './options.js'

/** How a checkpoint is compressed. */
export interface CompressOptions {
  /** Folder to write. It must not exist, or be empty. */
  out: string
  /** Compression method, default `gptq`. */
  method?: 'gptq' | 'rtn' | 'awq'
  /** AWQ: what rounds the scaled weights, default `rtn`. */
  rounding?: 'rtn' | 'gptq'
  /** Width of a code, default 4; that of the type with `format: 'gguf:…'`. */
  bits?: 2 | 3 | 4 | 5 | 6 | 8
  /**
   * In place of `bits`: bits per weight that codes, scales and zero points may take together, such as 3.5. Linears that
   * servers fuse get the widths that do least damage to the outputs of their blocks; needs a calibration text.
   */
  bitBudget?: number
  /** Weights that share a scale, or `'whole'` for one scale per output row; default 128, or 32 for GGUF. */
  groupSize?: number | 'whole'
  /**
   * Which way the weights of a group lie. `input`, the default: inputs of one output, as servers read them. `output`:
   * outputs of one input, which helps where few inputs are large. `adaptive`: for each Linear what does less damage to
   * its outputs (AdaDim). The last two are written in our own format, which only this library reads; not with AWQ.
   */
  groupAxis?: GroupAxis | 'adaptive'
  /** Linears that are quantized otherwise; the first that matches counts. */
  overrides?: LinearOverride[]
  /**
   * How quantized Linears are laid out. `auto`, the default, is what servers read fastest: compressed-tensors, and GPTQ
   * for 2 and 3 bits where it holds every Linear. `gguf:Q4_0` and `gguf:Q8_0` leave `model.gguf` in the folder, for
   * llama.cpp: their codes are those that the method chose. Other types round once more: {@link convert} to them.
   */
  format?: 'auto' | LinearFormat | CompressedGguf
  /** Grids around zero, without zero points; default false, or true for GGUF. */
  symmetric?: boolean
  /** Number type of the scales; `auto` (the default) is that of the checkpoint, f16 for f32 checkpoints and for GGUF. */
  scaleType?: 'auto' | 'bf16' | 'f16' | 'f32'
  /**
   * Shrink the range of a group where that lowers its error, weighted by the activations where there is calibration;
   * default true for AWQ, else false.
   */
  clip?: boolean
  /** GPTQ: columns in the order of descending second moment; default true. */
  actOrder?: boolean
  /** GPTQ: scales from the original weights, so that groups stay contiguous; default true. */
  staticGroups?: boolean
  /** GPTQ: share of the mean diagonal that is added to the second moments; default 0.01. */
  damping?: number
  /** What the model reads while its statistics are taken. GPTQ, AWQ and EoRA need it. */
  calibration?: CalibrationOptions
  /** File (safetensors) to save the statistics in, for other jobs on the same model; not with AWQ. */
  saveStatistics?: string
  /**
   * Bytes of memory that the job may take; by default what the machine and its control groups have available. Changes
   * no bit of the output. A job that does not fit is refused before it starts.
   */
  memory?: number
  /** Low-rank compensation of what compression broke. */
  eora?: EoraOptions
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

/** A layout of quantized Linears that is written. */
export type LinearFormat = 'compressed-tensors/pack-quantized' | 'gptq' | 'gptq_v2' | 'awq' | 'kintsugi'

/** Types of GGUF that hold what a compression rounds to as it is. */
export type CompressedGguf = 'gguf:Q4_0' | 'gguf:Q8_0'

/** Options of some Linears. */
export interface LinearOverride {
  /** Their names; `*` stands for any characters: `*.down_proj`, `model.layers.0.*`. */
  linears: string
  bits?: CompressOptions['bits']
  groupSize?: number | 'whole'
}

/** Which way the weights of a group lie: inputs of one output, or outputs of one input. */
export type GroupAxis = 'input' | 'output'

/**
 * `f32`: plain float arithmetic. `exact`: bf16 activations where the CPU multiplies bf16, else f32. `fast`: int8
 * activations with a scale for each run of up to 128 inputs of a group where the weights are codes that stand for integers, as
 * `exact` elsewhere (plain floats, NF4, groups along the outputs); A of a compensation reads the same int8, as codes of 8 bits.
 */
export type Precision = 'f32' | 'exact' | 'fast'

/** What activations are rounded to in a product: f32 is none. */
export type Arithmetic = 'f32' | 'bf16' | 'int8'

/** `cpu`: our kernels. `candle`: candle's plain float operations, the reference. */
export type Backend = 'cpu' | 'candle'

/** What was asked, with every default filled in. `null` means: whole row, chosen by the checkpoint, or without. */
export interface Recipe {
  source: string
  out: string
  method: string
  rounding: string
  bits: number
  bitBudget: number | null
  groupSize: number | null
  groupAxis: GroupAxis | 'adaptive'
  overrides: { linears: string; bits: number | null; groupSize: number | null }[]
  format: string
  symmetric: boolean
  clip: boolean
  actOrder: boolean
  staticGroups: boolean
  damping: number
  scaleType: string | null
  calibration: null | RecipeCalibration
  saveStatistics: string | null
  eora: null | EoraRecipe
}

/** What will be done to each Linear. */
export interface Plan {
  recipe: Recipe
  /** Layout of the quantized Linears. */
  format: LinearFormat | CompressedGguf
  architecture: string
  linears: PlannedLinear[]
  quantizedWeights: number
  /** Bits of codes, scales, zero points and factors over the number of quantized weights. */
  bitsPerWeight: number
  /** Bytes of tensors that will be written. */
  bytes: number
  /** Bytes of the source's tensors. */
  sourceBytes: number
  memory: MemoryPlan
  disk: DiskPlan
}

/** The memory that a job takes at most, estimated from shapes, recipe and threads. */
export interface MemoryPlan {
  /** The estimate. */
  peakBytes: number
  /** What the job may take. */
  budgetBytes: number
  /** Whether the calibration activations lie on disk. */
  activationsOnDisk: boolean
  /** Forward passes per block that take statistics; more than one where those of a block do not fit together. */
  passes: number
  /** What the estimate consists of, in bytes. */
  parts: Record<
    | 'base'
    | 'text'
    | 'embedding'
    | 'weights'
    | 'prepared'
    | 'statistics'
    | 'forward'
    | 'quantized'
    | 'solver'
    | 'activations'
    | 'factors'
    | 'ablation',
    number
  >
}

/** The disk space that a job takes at most while it runs. */
export interface DiskPlan {
  /** For the output and what is kept beside it. */
  neededBytes: number
  /** For the statistics that are saved. */
  statisticsBytes: number
}

/** One Linear of a {@link Plan}; its weight is `[rows, columns]` = `[outFeatures, inFeatures]`. */
export interface PlannedLinear {
  name: string
  rows: number
  columns: number
  /** `null` while a bit budget decides. */
  bits: number | null
  /** Most that the rank can be; 0 without compensation. */
  rank: number
  storedBits: number
}

/** What a compression did; `report.json` in the folder that was written. */
export interface CompressReport {
  recipe: Recipe
  summary: CompressSummary
  linears: CompressedLinear[]
}

/** The whole model. */
export interface CompressSummary {
  /** Layout of the quantized Linears. */
  format: LinearFormat | CompressedGguf
  /** What a GGUF file does not say of the source; empty for other formats. */
  notices: string[]
  /** Bits of codes, scales, zero points and factors over the number of quantized weights. */
  bitsPerWeight: number
  /** Bytes of the folder. */
  bytes: number
  sourceBytes: number
  quantizedWeights: number
  calibrationTokens: number
  /** The same by source; empty without calibration. */
  calibration: CalibrationShare[]
  /** Means over the Linears of their relative errors; `null` without calibration. */
  meanError: null | { quantized: number; compensated: number }
  /** All compensations; `null` without. */
  compensation: null | CompensationSummary
  seconds: number
  /** Where the time went. */
  phases: Record<'read' | 'calibrate' | 'compress' | 'compensate' | 'write', number>
  /** Largest resident set of the process so far; `null` where the system does not tell. */
  peakMemoryBytes: number | null
}

/** One Linear of a {@link CompressReport}; its weight is `[rows, columns]` = `[outFeatures, inFeatures]`. */
export interface CompressedLinear {
  name: string
  rows: number
  columns: number
  bits: number
  groupSize: number | null
  groupAxis: GroupAxis
  /** AWQ: exponent of the activations that its inputs are scaled by; `null` without. */
  alpha: number | null
  /** Rank of the factors; 0 without. */
  rank: number
  /** Calibration tokens that reached it, fewer than all for an expert; `null` when none did or without calibration. */
  calibrationTokens: number | null
  storedBits: number
  /**
   * With `grouped`: the Linears that it shares A of its compensation with. Ranks, errors and certificate are then those of
   * all together, each relative to the size of its outputs (by powers of two), and the bits of A are counted with the first
   * of them.
   */
  sharedWith?: string[]
  /**
   * ‖(W−Ŵ)X‖ / ‖WX‖ over the calibration inputs: without compensation, with it, and the least that any factors of
   * this rank reach. `null` where no calibration token reached it. With `mixed` inputs it is the error of their target.
   */
  error: null | { quantized: number; compensated: number; bound: number }
  /** The same on inputs that took no part in the calibration; `null` without compensation or such inputs. */
  holdOut: null | HoldOutError
  /** Against the original model; `null` unless the compensation was solved for `mixed` inputs. */
  denseError: null | DenseError
  /** The proof that the compensation is the best of the largest rank; `null` without one. */
  certificate: null | Certificate
}

/** The grids that formats ask for which know one only. */
const GRIDS: Partial<Record<string, Pick<Required<CompressOptions>, 'bits' | 'groupSize' | 'symmetric' | 'scaleType'>>> =
  {
    'gguf:Q4_0': { bits: 4, groupSize: 32, symmetric: true, scaleType: 'f16' },
    'gguf:Q8_0': { bits: 8, groupSize: 32, symmetric: true, scaleType: 'f16' },
  }
const USUAL_GRID = { bits: 4, groupSize: 128, symmetric: false, scaleType: 'auto' } as const

const schema = {
  out: text,
  method: withDefault(text, 'gptq'),
  rounding: withDefault(text, 'rtn'),
  bits: optional(oneOf([2, 3, 4, 5, 6, 8])),
  bitBudget: optional(number({ min: 1, max: 16 })),
  groupSize: optional(groupSize),
  groupAxis: withDefault(oneOf(['input', 'output', 'adaptive']), 'input'),
  overrides: withDefault(
    listOf(object({ linears: text, bits: optional(oneOf([2, 3, 4, 5, 6, 8])), groupSize: optional(groupSize) })),
    [],
  ),
  format: withDefault(text, 'auto'),
  symmetric: optional(boolean),
  scaleType: optional(oneOf(['auto', 'bf16', 'f16', 'f32'])),
  clip: optional(boolean),
  actOrder: withDefault(boolean, true),
  staticGroups: withDefault(boolean, true),
  damping: withDefault(number({ min: 0, max: 1 }), 0.01),
  calibration: optional(calibrationSchema),
  saveStatistics: optional(text),
  memory: optional(integer({ min: 1 })),
  eora: optional(eoraSchema),
  precision: withDefault(oneOf(['f32', 'exact']), 'exact'),
  backend: withDefault(oneOf(['cpu', 'candle']), 'cpu'),
  fresh: withDefault(boolean, false),
  dryRun: withDefault(boolean, false),
  signal: optional(abortSignal),
}

/**
 * Compresses the Linears of a checkpoint, block by block, and writes a Hugging Face folder, or one with a GGUF file, in
 * the format of `options.format` with `report.json`, and with the compensation as PEFT folder `eora/`. Everything is written
 * under `OUT.partial` and renamed at the end. A job that is cancelled or killed leaves that folder, and the same call
 * goes on behind the last block that was finished; a job whose input is refused leaves nothing behind.
 */
export function compress(source: string | Checkpoint, options: CompressOptions & { dryRun: true }): Job<Plan>
export function compress(
  source: string | Checkpoint,
  options: CompressOptions & { dryRun?: false },
): Job<CompressReport>
export function compress(source: string | Checkpoint, options: CompressOptions): Job<CompressReport | Plan>
export function compress(source: string | Checkpoint, options: CompressOptions): Job<CompressReport | Plan> {
  return new Job(() => {
    const folder = folderOf(source, 'source')
    const { bits, groupSize, symmetric, scaleType, ...rest } = checkOptions(options, schema)
    const { calibration, clip, eora, overrides, signal: _, ...given } = rest
    if (bits !== undefined && given.bitBudget !== undefined) {
      throw new KintsugiError({
        code: 'ERR_OPTION_INVALID',
        message: 'bits and a bit budget exclude each other',
        subject: 'bitBudget',
        hint: 'Give bits for one width, or bitBudget for widths that differ.',
      })
    }
    const grid = GRIDS[given.format] ?? USUAL_GRID
    const request = withoutUndefined({
      ...given,
      bits: bits ?? grid.bits,
      source: folder,
      clip: clip ?? given.method === 'awq',
      groupSize: groupSizeNumber(groupSize ?? grid.groupSize),
      symmetric: symmetric ?? grid.symmetric,
      scaleType: scaleType ?? grid.scaleType,
      overrides: overrides.map(({ groupSize, ...others }) =>
        withoutUndefined({ ...others, groupSize: groupSize === undefined ? undefined : groupSizeNumber(groupSize) }),
      ),
      calibration: calibration && calibrationRequest(calibration),
      eora: eora && eoraRequest(eora),
    })
    const control = new (native().BindingControl)()
    return { control, result: native().compress(request, control) as Promise<CompressReport | Plan> }
  }, [signalOf(options)])
}

/** What the addon takes for a group size. */
export function groupSizeNumber(size: number | 'whole'): number {
  return size === 'whole' ? 0 : size
}
