import { type Checkpoint, folderOf } from './checkpoint.js'
import { type CompressOptions, groupSizeNumber, type LinearFormat } from './compress.js'
import { Job } from './job.js'
import { native } from './native.js'
import {
  abortSignal,
  boolean,
  checkOptions,
  groupSize,
  oneOf,
  optional,
  signalOf,
  text,
  withDefault,
  withoutUndefined,
} from './options.js'

/** Options of {@link convert}. */
export interface ConvertOptions {
  /** Folder to write; must not exist, or be empty. For GGUF the name of a file that does not exist. */
  out: string
  /** Layout of the quantized Linears, a float type that they are widened to, or a GGUF file with that type. */
  format: LinearFormat | 'f32' | 'f16' | 'bf16' | `gguf:${GgufType}`
  /**
   * Round Linears anew whose grid the format does not hold; default false: such a conversion is refused with its cost.
   * For GGUF also those that another type holds, if that takes more bits.
   */
  allowRequantize?: boolean
  /** Width of a code of Linears that are rounded anew; the nearest that the format holds when not given. */
  bits?: CompressOptions['bits']
  /** Inputs that share a scale there; likewise. */
  groupSize?: number | 'whole'
  /** Only measure what it would cost; nothing stays. A GGUF file is written beside `out` for that and removed. */
  dryRun?: boolean
  /** Aborting it cancels the job. */
  signal?: AbortSignal
}

/** Types of tensors that GGUF files are written with; rows that are no whole blocks of one get a wider type. */
export type GgufType = 'Q4_0' | 'Q4_1' | 'Q4_K' | 'Q6_K' | 'Q8_0' | 'F16' | 'BF16' | 'F32'

/** What a conversion did, or would do. */
export interface ConversionReport {
  recipe: {
    source: string
    out: string
    format: string
    allowRequantize: boolean
    bits: number | null
    groupSize: number | null
    dryRun: boolean
  }
  /** Layout of the source. */
  sourceFormat: string
  /** Layout that was written. */
  format: string
  /** Bytes of the source's tensors. */
  sourceBytes: number
  /** Bytes of the folder; 0 for a dry run. */
  bytes: number
  linears: ConvertedLinear[]
  /** What the result does not say of the source; normally empty. */
  notices: string[]
  seconds: number
}

/** One Linear of a {@link ConversionReport}; its weight is `[rows, columns]` = `[outFeatures, inFeatures]`. */
export interface ConvertedLinear {
  name: string
  rows: number
  columns: number
  /** Bits of a weight, in codes or floats. */
  bits: number
  /** Whether every weight kept its value. */
  exact: boolean
  /** ‖W′ − W‖ / ‖W‖ between what is written and what was read; 0 where exact. */
  error: number
}

const schema = {
  out: text,
  format: text,
  allowRequantize: withDefault(boolean, false),
  bits: optional(oneOf([2, 3, 4, 5, 6, 8])),
  groupSize: optional(groupSize),
  dryRun: withDefault(boolean, false),
  signal: optional(abortSignal),
}

/**
 * Writes the quantized Linears of a checkpoint in another format and copies everything else. Weights keep their values
 * bit for bit where the format holds their grid; where it does not, the job is refused with `ERR_CONVERSION_INEXACT`
 * and the cost, unless `allowRequantize` is set. A GGUF file carries the tokenizer and the chat template, so that
 * llama.cpp runs it; it may also be made of a checkpoint in plain floats.
 */
export function convert(source: string | Checkpoint, options: ConvertOptions): Job<ConversionReport> {
  return new Job(() => {
    const folder = folderOf(source, 'source')
    const { groupSize, signal: _, ...given } = checkOptions(options, schema)
    const request = withoutUndefined({
      ...given,
      source: folder,
      groupSize: groupSize === undefined ? undefined : groupSizeNumber(groupSize),
    })
    const control = new (native().BindingControl)()
    return { control, result: native().convert(request, control) as Promise<ConversionReport> }
  }, [signalOf(options)])
}
