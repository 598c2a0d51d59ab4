import * as onnx from 'onnxruntime-node'

import type { Candidate, Problem } from './candidate.js'

/** Protobuf (wire format version 3), as far as a model needs it. */
class Message {
  #parts: Uint8Array[] = []

  integer(field: number, value: number): this {
    return this.#varint(field << 3).#varint(value)
  }

  bytes(field: number, value: Uint8Array): this {
    this.#varint((field << 3) | 2).#varint(value.length)
    this.#parts.push(value)
    return this
  }

  text(field: number, value: string): this {
    return this.bytes(field, new TextEncoder().encode(value))
  }

  message(field: number, value: Message): this {
    return this.bytes(field, value.encode())
  }

  encode(): Uint8Array {
    return Buffer.concat(this.#parts)
  }

  #varint(value: number): this {
    const bytes = []
    for (; value > 127; value = Math.floor(value / 128)) bytes.push((value % 128) | 128)
    this.#parts.push(Uint8Array.from([...bytes, value]))
    return this
  }
}

// Numbers of fields and types: onnx.proto.
const FLOAT = 1
const UINT8 = 2
const INT_ATTRIBUTE = 2

function attribute(name: string, value: number): Message {
  return new Message().text(1, name).integer(3, value).integer(20, INT_ATTRIBUTE)
}

function tensor(name: string, type: number, dims: number[], data: Uint8Array): Message {
  const message = new Message()
  dims.forEach((dim) => message.integer(1, dim))
  return message.integer(2, type).text(8, name).bytes(9, data)
}

function value(name: string, dims: (number | string)[]): Message {
  const shape = new Message()
  for (const dim of dims) {
    shape.message(1, typeof dim === 'number' ? new Message().integer(1, dim) : new Message().text(2, dim))
  }
  const type = new Message().message(1, new Message().integer(1, FLOAT).message(2, shape))
  return new Message().text(1, name).message(2, type)
}

/** Codes of 4 bits around 8 with a scale per block, as `MatMulNBits` takes them. */
function quantize(weight: Float32Array, block: number): { codes: Uint8Array; scales: Float32Array } {
  const codes = new Uint8Array(weight.length / 2)
  const scales = new Float32Array(weight.length / block)
  for (let start = 0; start < weight.length; start += block) {
    let largest = 0
    for (let i = start; i < start + block; i++) largest = Math.max(largest, Math.abs(weight[i] ?? 0))
    const scale = largest / 7.5 || 1
    scales[start / block] = scale
    for (let i = start; i < start + block; i++) {
      const code = Math.min(15, Math.max(0, Math.round((weight[i] ?? 0) / scale) + 8))
      codes[i >> 1] = (codes[i >> 1] ?? 0) | (code << ((i & 1) * 4))
    }
  }
  return { codes, scales }
}

/** ONNX Runtime's `MatMulNBits` with int8 activations (accuracy level 4), all matrices in one graph. */
export async function onnxCandidate(problem: Problem, block: number): Promise<Candidate> {
  const { N, K, weights, inputs, threads } = problem
  const graph = new Message()
  const outputs: Message[] = []
  const initializers: Message[] = []
  let quantized = { codes: new Uint8Array(), scales: new Float32Array() }
  weights.forEach((weight, i) => {
    if (weight !== weights[i - 1]) quantized = quantize(weight, block)
    // Weights that are equal would be kept once, and read from the cache: another code and scale make each its own.
    const [codes, scales] = [quantized.codes.slice(), quantized.scales.slice()]
    if (i > 0) {
      codes[i] = 0xff - (codes[i] ?? 0)
      scales[i] = 1.001 * (scales[i] ?? 0)
    }
    initializers.push(tensor(`B${i}`, UINT8, [N, K / block, block / 2], codes))
    initializers.push(tensor(`s${i}`, FLOAT, [N * (K / block)], new Uint8Array(scales.buffer)))
    const node = new Message().text(1, 'x').text(1, `B${i}`).text(1, `s${i}`).text(2, `y${i}`)
    node.text(3, `n${i}`).text(4, 'MatMulNBits').text(7, 'com.microsoft')
    const attributes = { K, N, bits: 4, block_size: block, accuracy_level: 4 }
    Object.entries(attributes).forEach(([name, number]) => node.message(5, attribute(name, number)))
    graph.message(1, node)
    outputs.push(value(`y${i}`, ['rows', N]))
  })
  graph.text(2, 'products')
  initializers.forEach((initializer) => graph.message(5, initializer))
  graph.message(11, value('x', ['rows', K]))
  outputs.forEach((output) => graph.message(12, output))
  const opset = (domain: string, version: number): Message => new Message().text(1, domain).integer(2, version)
  const model = new Message().integer(1, 8).message(7, graph).message(8, opset('', 17)).message(8, opset('com.microsoft', 1))
  const session = await onnx.InferenceSession.create(model.encode(), {
    intraOpNumThreads: threads,
    interOpNumThreads: 1,
    // Threads that go on spinning after a run would take the CPU from the candidate whose turn is next.
    extra: { session: { intra_op: { allow_spinning: '0' } } },
  })
  const tensors = new Map([...inputs].map(([rows, x]) => [rows, new onnx.Tensor('float32', x, [rows, K])]))
  const run = (rows: number): Promise<onnx.InferenceSession.OnnxValueMapType> => {
    const x = tensors.get(rows)
    if (!x) throw new Error(`no input of ${rows} rows`)
    return session.run({ x }, ['y0'])
  }
  return {
    name: `onnxruntime int8 g${block}`,
    bytes: N * K * (0.5 + 4 / block),
    run: async (rows) => void (await run(rows)),
    first: async (rows) => (await run(rows)).y0?.data as Float32Array,
  }
}
