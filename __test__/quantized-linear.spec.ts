import test from 'ava'
import { QuantizedLinear, type QuantizedLinearOptions } from 'kintsugi'

import { failsWith, gaussian } from './fixtures.js'

/** Round to nearest in f64 with scales in f16, written down once more: `[outFeatures, inFeatures]` as it will be used. */
function dequantized(weights: Float32Array, options: QuantizedLinearOptions): Float64Array {
  const { outFeatures, inFeatures, bits = 4, groupSize = 128, symmetric = false } = options
  const group = groupSize === 'whole' ? inFeatures : groupSize
  const levels = 2 ** bits - 1
  const result = new Float64Array(weights.length)
  for (let row = 0; row < outFeatures; row++) {
    for (let start = 0; start < inFeatures; start += group) {
      const end = Math.min(start + group, inFeatures)
      const values = weights.subarray(row * inFeatures + start, row * inFeatures + end)
      const low = Math.min(0, ...values)
      const high = Math.max(0, ...values)
      const scale = toHalf(symmetric ? (2 * Math.max(-low, high)) / levels : (high - low) / levels)
      const zero = symmetric ? 2 ** (bits - 1) : Math.round(-low / scale)
      for (const [i, value] of values.entries()) {
        const code = Math.min(levels, Math.max(0, Math.round(value / scale) + zero))
        result[row * inFeatures + start + i] = (code - zero) * scale
      }
    }
  }
  return result
}

/** The nearest f16 of a positive number in its normal range. */
function toHalf(value: number): number {
  const step = 2 ** (Math.floor(Math.log2(value)) - 10)
  return Math.round(value / step) * step
}

function product(matrix: Float64Array, x: Float32Array, outFeatures: number, inFeatures: number): Float64Array {
  const count = x.length / inFeatures
  const y = new Float64Array(count * outFeatures)
  for (let n = 0; n < count; n++) {
    for (let row = 0; row < outFeatures; row++) {
      let sum = 0
      for (let k = 0; k < inFeatures; k++) sum += matrix[row * inFeatures + k]! * x[n * inFeatures + k]!
      y[n * outFeatures + row] = sum
    }
  }
  return y
}

function relativeError(actual: Float32Array, expected: Float64Array): number {
  let difference = 0
  let energy = 0
  for (const [i, value] of expected.entries()) {
    difference += (actual[i]! - value) ** 2
    energy += value ** 2
  }
  return Math.sqrt(difference / energy)
}

for (const options of [
  { outFeatures: 64, inFeatures: 256, bits: 4, groupSize: 64 },
  { outFeatures: 37, inFeatures: 200, bits: 4, groupSize: 128 },
  { outFeatures: 48, inFeatures: 96, bits: 8, groupSize: 'whole' },
  { outFeatures: 16, inFeatures: 128, bits: 3, groupSize: 32 },
  { outFeatures: 16, inFeatures: 128, bits: 4, groupSize: 64, symmetric: true },
  { outFeatures: 5, inFeatures: 64, bits: 2, groupSize: 32 },
] as QuantizedLinearOptions[]) {
  test(`${options.symmetric ? 'symmetric ' : ''}${options.bits} bits, groups of ${options.groupSize}, ${options.outFeatures}×${options.inFeatures}`, async (t) => {
    const { outFeatures, inFeatures } = options
    const weights = gaussian(outFeatures * inFeatures, 1)
    const x = gaussian(3 * inFeatures, 2)
    using layer = QuantizedLinear.quantize(weights, { ...options, precision: 'f32' })
    const expected = product(dequantized(weights, options), x, outFeatures, inFeatures)
    const y = layer.forward(x)
    t.is(y.length, 3 * outFeatures)
    t.true(relativeError(y, expected) < 1e-5, `f32: ${relativeError(y, expected)}`)
    t.deepEqual(await layer.forwardAsync(x), y)

    using exact = QuantizedLinear.quantize(weights, options)
    t.true(relativeError(exact.forward(x), expected) < 1e-2, 'exact')

    using fast = QuantizedLinear.quantize(weights, { ...options, precision: 'fast' })
    t.is(fast.info.arithmetic, 'int8')
    t.true(relativeError(fast.forward(x), expected) < 2e-2, 'fast')
  })
}

test('what it is', (t) => {
  using layer = QuantizedLinear.quantize(gaussian(64 * 128, 1), { outFeatures: 64, inFeatures: 128, groupSize: 64 })
  t.like(layer.info, { outFeatures: 64, inFeatures: 128, bits: 4 })
  // 4 bits for the code, 16 for the scale and 4 for the zero point of 64 weights.
  t.is(layer.info.bitsPerWeight, 4 + 20 / 64)
  t.true(layer.info.memoryBytes >= (64 * 128) / 2)
})

test('views with an offset are read where they are', (t) => {
  const buffer = gaussian(16 + 32 * 64, 4)
  const options = { outFeatures: 32, inFeatures: 64, groupSize: 32 }
  using view = QuantizedLinear.quantize(buffer.subarray(16), options)
  using copy = QuantizedLinear.quantize(buffer.slice(16), options)
  t.deepEqual(view.forward(buffer.subarray(7, 71)), copy.forward(buffer.slice(7, 71)))
})

test('forward writes into the array that it is given, and into nothing else', async (t) => {
  using layer = QuantizedLinear.quantize(gaussian(40 * 64, 7), { outFeatures: 40, inFeatures: 64 })
  const x = gaussian(3 * 64, 8)
  const expected = layer.forward(x)
  const memory = new Float32Array(3 * 40 + 20).fill(7)
  const out = memory.subarray(10, 130)
  t.is(layer.forward(x, out), out)
  t.deepEqual(out, expected)
  t.true([...memory.subarray(0, 10), ...memory.subarray(130)].every((value) => value === 7))

  await failsWith(t, () => layer.forward(x, new Float32Array(119)), 'ERR_SHAPE_MISMATCH', 'out')
  await failsWith(t, () => layer.forward(x, new Float64Array(120) as never), 'ERR_OPTION_INVALID', 'out')
  const shared = new Float32Array(3 * 64 + 3 * 40 - 1)
  await failsWith(t, () => layer.forward(shared.subarray(0, 192), shared.subarray(191)), 'ERR_OPTION_INVALID', 'out')
  const beside = new Float32Array(3 * 64 + 3 * 40)
  beside.set(x)
  t.deepEqual(layer.forward(beside.subarray(0, 192), beside.subarray(192)), expected)
})

test('forwardAsync takes a copy: the caller may change x at once', async (t) => {
  const options = { outFeatures: 256, inFeatures: 256, groupSize: 64 }
  using layer = QuantizedLinear.quantize(gaussian(256 * 256, 5), options)
  const x = gaussian(64 * 256, 6)
  const expected = layer.forward(x)
  const pending = layer.forwardAsync(x)
  x.fill(Number.NaN)
  t.deepEqual(await pending, expected)
})

test('input that does not fit is refused by name', async (t) => {
  const weights = gaussian(64 * 64, 1)
  const shape = { outFeatures: 64, inFeatures: 64, groupSize: 32 }
  const quantize = (given: unknown, options: unknown): QuantizedLinear =>
    QuantizedLinear.quantize(given as Float32Array, options as QuantizedLinearOptions)
  await failsWith(t, () => quantize(weights.subarray(1), shape), 'ERR_SHAPE_MISMATCH', 'weights')
  await failsWith(t, () => quantize([...weights], shape), 'ERR_OPTION_INVALID', 'weights')
  await failsWith(t, () => quantize(new Float64Array(weights), shape), 'ERR_OPTION_INVALID', 'weights')
  await failsWith(t, () => quantize(weights, { ...shape, bit: 4 }), 'ERR_OPTION_UNKNOWN', 'bit')
  await failsWith(t, () => quantize(weights, { ...shape, outFeatures: 0 }), 'ERR_OPTION_INVALID', 'outFeatures')
  const holed = Float32Array.from(weights)
  holed[100] = Number.NaN
  await failsWith(t, () => quantize(holed, shape), 'ERR_VALUE_NOT_FINITE')

  using layer = quantize(weights, shape)
  await failsWith(t, () => layer.forward(new Float32Array(63)), 'ERR_SHAPE_MISMATCH', 'x')
  await failsWith(t, () => layer.forward(new Float32Array(0)), 'ERR_SHAPE_MISMATCH', 'x')
  await failsWith(t, () => layer.forwardAsync(new Float32Array(65)), 'ERR_SHAPE_MISMATCH', 'x')
  layer.dispose()
  layer.dispose()
  await failsWith(t, () => layer.forward(new Float32Array(64)), 'ERR_DISPOSED')
  await failsWith(t, () => layer.forwardAsync(new Float32Array(64)), 'ERR_DISPOSED')
  await failsWith(t, () => layer.info, 'ERR_DISPOSED')
})
