import { cpus } from 'node:os'

import type { Arithmetic, Precision } from './compress.js'
import { Job } from './job.js'
import { native } from './native.js'
import {
  abortSignal,
  checkOptions,
  integer,
  listOf,
  number,
  optional,
  signalOf,
  withDefault,
  withoutUndefined,
} from './options.js'
import { packageVersion } from './package-version.js'

/** Options of {@link measureSpeed}. */
export interface MeasureSpeedOptions {
  /** Seconds that measuring may take, default 12. Every product is measured once, whatever that takes. */
  seconds?: number
  /** Number of threads to compare with one; default those of the shared pool. */
  threads?: number
  /** Rows of x of the products: tokens that are computed at once, each number once. Default 1, 8 and 512. */
  rows?: number[]
  /** Aborting it cancels the job. */
  signal?: AbortSignal
}

/** What this machine can do, and what products reach of it. */
export interface SpeedReport {
  /** Version of this package. */
  version: string
  /** `process.platform`, `-`, `process.arch`. */
  platform: string
  /** Name of the CPU; `null` where the system does not tell. */
  cpuName: string | null
  /** Instruction set of products and arithmetic ceilings. */
  cpuLevel: string
  /** Thread counts that were measured: one, and all. */
  threads: number[]
  /** Shape of every matrix. */
  outFeatures: number
  inFeatures: number
  /** Bytes of the last cache, all its parts together; `null` where the system does not tell. */
  cacheBytes: number | null
  /** Bytes of the matrices of a kind that take turns, and of the loop that only reads. */
  workingSetBytes: number
  ceilings: CeilingSpeed[]
  products: ProductSpeed[]
  /** What the products of one row leave for whole models; empty when one row was not measured. */
  models: ModelSpeed[]
  /** Seconds that all of it took. */
  seconds: number
}

/**
 * What measurements in several rounds came to: a tenth of them is below `low`, half below `median`, a tenth above `high`.
 * Below five rounds `low` and `high` are the least and the greatest.
 */
export interface Spread {
  low: number
  median: number
  high: number
}

/** The rate of a loop that does one thing only. */
export interface CeilingSpeed {
  /** `memory`: bytes read; otherwise operations of that arithmetic. */
  kind: 'memory' | Arithmetic
  /** What the loop consists of. */
  instructions: string
  threads: number
  /** How many times it was measured. */
  rounds: number
  /** Bytes or operations per second, all threads together; a multiplication and an addition are two operations. */
  rate: Spread
}

/** The weights of a {@link ProductSpeed} or {@link ModelSpeed}. */
export interface MeasuredWeights {
  /** `int4`, `int8` or `bf16`. */
  weights: string
  /** Inputs that share a scale; `null` for plain floats. */
  groupSize: number | null
  /** Rank of a compensation in bf16; 0 for none. */
  rank: number
  precision: Precision
}

/** One kind of product. */
export interface ProductSpeed extends MeasuredWeights {
  /** What the precision comes to on this machine. */
  arithmetic: Arithmetic
  /** Bits in memory per weight, with scales and compensation. */
  bitsPerWeight: number
  /** Rows of x. */
  rows: number
  threads: number
  /** How many times it was measured. */
  rounds: number
  /** Seconds of a product. */
  seconds: Spread
  /** Bytes of the matrix per second, from the median. */
  bytesPerSecond: number
  /** Multiplications and additions per second, from the median. */
  operationsPerSecond: number
  /** Which ceiling alone takes longer: reading the matrix, or multiplying. */
  limit: 'memory' | 'arithmetic'
  /** Seconds that the ceilings of the same rounds would take, as a share of the median. */
  share: number
}

/**
 * Tokens per second that products of one row leave to a model whose weights are all of one kind: bytes per second over
 * bytes of the weights. Attention, norms and sampling come on top.
 */
export interface ModelSpeed extends MeasuredWeights {
  /** Weights of the model. */
  parameters: number
  threads: number
  /** At most. */
  tokensPerSecond: number
}

const schema = {
  seconds: withDefault(number({ min: 0.001, max: 3600 }), 12),
  threads: optional(integer({ min: 1, max: 1024 })),
  rows: withDefault(listOf(integer({ min: 1, max: 4096 })), [1, 8, 512]),
  signal: optional(abortSignal),
}

/**
 * Measures how fast this machine reads and multiplies, and how fast products are beside that, on one thread and on all.
 * Loops and products take turns, and matrices are larger than the caches together. It keeps all threads busy: what runs
 * beside it is part of the result, and so is it of what others measure.
 *
 * The job rejects with `ERR_MEMORY_EXCEEDED` where such matrices do not fit into the memory, and with `ERR_IO` where
 * the system refuses to start so many threads.
 */
export function measureSpeed(options: MeasureSpeedOptions = {}): Job<SpeedReport> {
  return new Job(() => {
    const { signal: _, ...given } = checkOptions(options, schema)
    const control = new (native().BindingControl)()
    const result = native().measureSpeed(withoutUndefined(given), control) as Promise<
      Omit<SpeedReport, 'version' | 'platform' | 'cpuName'>
    >
    const machine = { version: packageVersion(), platform: `${process.platform}-${process.arch}`, cpuName: cpuName() }
    return { control, result: result.then((report) => ({ ...machine, ...report })) }
  }, [signalOf(options)])
}

/** Node says 'unknown' where the system does not tell. */
function cpuName(): string | null {
  const name = cpus()[0]?.model.trim()
  return !name || name === 'unknown' ? null : name
}
