import type { Arithmetic, Precision } from './compress.js'
import { fromNative, KintsugiError } from './errors.js'
import { type BindingQuantizedLinear, native } from './native.js'
import { boolean, checkOptions, groupSize, integer, oneOf, withDefault } from './options.js'

/** How a matrix is quantized. */
export interface QuantizedLinearOptions {
  outFeatures: number
  inFeatures: number
  /** Width of a code, default 4. */
  bits?: 2 | 3 | 4 | 5 | 6 | 8
  /** Inputs that share a scale, or `'whole'` for one scale per output; default 128. */
  groupSize?: number | 'whole'
  /** Grids around zero, without zero points; default false. */
  symmetric?: boolean
  /** Arithmetic of the products, default `exact`. */
  precision?: Precision
}

/** What a {@link QuantizedLinear} is. */
export interface QuantizedLinearInfo {
  outFeatures: number
  inFeatures: number
  bits: number
  /** Bits of codes, scales and zero points over the number of weights. */
  bitsPerWeight: number
  /** Bytes of the packed matrix. */
  memoryBytes: number
  /** What the precision comes to with this matrix on this machine. */
  arithmetic: Arithmetic
  /** Instruction set of the kernels. */
  cpuLevel: string
}

const schema = {
  outFeatures: integer({ min: 1, max: 2 ** 24 }),
  inFeatures: integer({ min: 1, max: 2 ** 24 }),
  bits: withDefault(oneOf([2, 3, 4, 5, 6, 8]), 4),
  groupSize: withDefault(groupSize, 128),
  symmetric: withDefault(boolean, false),
  precision: withDefault(oneOf(['f32', 'exact', 'fast']), 'exact'),
}

/** One `y = W x` with a quantized `W`, which lives outside the JavaScript heap in the layout that this CPU reads. */
export class QuantizedLinear {
  readonly #binding: BindingQuantizedLinear
  readonly #shape: { outFeatures: number; inFeatures: number }
  #disposed = false

  private constructor(binding: BindingQuantizedLinear, shape: { outFeatures: number; inFeatures: number }) {
    this.#binding = binding
    this.#shape = shape
  }

  /**
   * Rounds each weight to the nearest point of the grid of its group.
   *
   * @param weights `[outFeatures, inFeatures]`, row after row
   * @throws KintsugiError `ERR_SHAPE_MISMATCH`, `ERR_VALUE_NOT_FINITE`, `ERR_OPTION_INVALID`, `ERR_OPTION_UNKNOWN`
   */
  static quantize(weights: Float32Array, options: QuantizedLinearOptions): QuantizedLinear {
    assertFloats(weights, 'weights')
    const { groupSize, ...given } = checkOptions(options, schema)
    try {
      const request = { ...given, groupSize: groupSize === 'whole' ? 0 : groupSize }
      return new QuantizedLinear(native().BindingQuantizedLinear.quantize(weights, request), given)
    } catch (error) {
      throw fromNative(error)
    }
  }

  /** What it is. */
  get info(): QuantizedLinearInfo {
    this.#assertAlive()
    return this.#binding.info() as QuantizedLinearInfo
  }

  /**
   * The product, computed before the call returns: for small matrices, where waiting costs more than the work.
   *
   * @param x `[count, inFeatures]`
   * @param out `[count, outFeatures]`, to be written and returned: new arrays of many rows take the system as long as a
   *   tenth of the product. It may not share memory with `x`.
   * @returns `[count, outFeatures]`
   * @throws KintsugiError `ERR_SHAPE_MISMATCH`, `ERR_OPTION_INVALID`, `ERR_DISPOSED`
   */
  forward(x: Float32Array, out?: Float32Array): Float32Array {
    this.#assertAlive()
    assertFloats(x, 'x')
    const { outFeatures, inFeatures } = this.#shape
    const length = Math.floor(x.length / inFeatures) * outFeatures
    const y = out ?? new Float32Array(length)
    if (out !== undefined) assertOutput(out, length, x)
    try {
      this.#binding.forward(x, y)
      return y
    } catch (error) {
      throw fromNative(error)
    }
  }

  /** The product, computed outside the event loop. `x` is copied first, so it may be changed at once. */
  async forwardAsync(x: Float32Array): Promise<Float32Array> {
    this.#assertAlive()
    assertFloats(x, 'x')
    try {
      return await this.#binding.forwardAsync(x)
    } catch (error) {
      throw fromNative(error)
    }
  }

  /** Frees the matrix. Products that have started finish; later calls fail with `ERR_DISPOSED`. */
  dispose(): void {
    if (this.#disposed) return
    this.#disposed = true
    this.#binding.dispose()
  }

  [Symbol.dispose](): void {
    this.dispose()
  }

  #assertAlive(): void {
    if (!this.#disposed) return
    throw new KintsugiError({
      code: 'ERR_DISPOSED',
      message: 'the matrix has been disposed of',
      subject: 'QuantizedLinear',
      hint: 'Quantize it again, or dispose of it later.',
    })
  }
}

function assertFloats(value: unknown, name: string): asserts value is Float32Array {
  if (value instanceof Float32Array) return
  throw new KintsugiError({
    code: 'ERR_OPTION_INVALID',
    message: `${name} must be a Float32Array`,
    subject: name,
    hint: 'Convert it with Float32Array.from().',
  })
}

/** Refuses what a product cannot be written into. */
function assertOutput(out: Float32Array, length: number, x: Float32Array): void {
  assertFloats(out, 'out')
  if (out.length !== length) {
    throw new KintsugiError({
      code: 'ERR_SHAPE_MISMATCH',
      message: `out has ${out.length} values where the product has ${length}`,
      subject: 'out',
      hint: 'Give it outFeatures values for each row of x.',
    })
  }
  const overlap = out.byteOffset < x.byteOffset + x.byteLength && x.byteOffset < out.byteOffset + out.byteLength
  if (out.buffer === x.buffer && overlap) {
    throw new KintsugiError({
      code: 'ERR_OPTION_INVALID',
      message: 'out shares memory with x',
      subject: 'out',
      hint: 'Give it memory of its own: x is read while out is written.',
    })
  }
}
