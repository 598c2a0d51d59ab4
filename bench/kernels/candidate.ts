/** One engine with one format: products of the same shape with several matrices. */
export interface Candidate {
  name: string
  /** Bytes of one matrix. */
  bytes: number
  /** Multiplies the input of `rows` rows with every matrix once. */
  run(rows: number): void | Promise<void>
  /** The product of the first matrix with the input of `rows` rows, `[rows, N]`. */
  first(rows: number): Float32Array | Promise<Float32Array>
}

/** What all candidates multiply. */
export interface Problem {
  /** Outputs. */
  N: number
  /** Inputs. */
  K: number
  /** `[N, K]` of each matrix. */
  weights: Float32Array[]
  /** `[rows, K]` by number of rows. */
  inputs: Map<number, Float32Array>
  threads: number
}
