import { execFileSync } from 'node:child_process'
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'

import { readSafetensors, ROOT, type Safetensors } from '../fixtures.js'

/** A sound checkpoint: llama, two blocks, 64 words, a hundredth of a megabyte. */
export const SOUND = join(ROOT, '__test__/vectors/families/llama')

// Files are forged field by field, never by the code that is under attack.

/** The parts of a checkpoint, to be spoiled before they are written. */
export interface Parts {
  config: Record<string, unknown>
  // eslint-disable-next-line
  tokenizer: any
  weights: Safetensors
}

/** Writes the sound checkpoint to `source/`, spoiled. */
export function checkpoint(folder: string, spoil: (parts: Parts) => void = () => {}): string {
  const read = (name: string): unknown => JSON.parse(readFileSync(join(SOUND, name), 'utf8'))
  const weights = readSafetensors(join(SOUND, 'model.safetensors'))
  const parts = { config: read('config.json'), tokenizer: read('tokenizer.json'), weights } as Parts
  spoil(parts)
  const source = join(folder, 'source')
  mkdirSync(source)
  writeFileSync(join(source, 'config.json'), JSON.stringify(parts.config))
  writeFileSync(join(source, 'tokenizer.json'), JSON.stringify(parts.tokenizer))
  writeFileSync(join(source, 'model.safetensors'), safetensors(JSON.stringify(weights.header), weights.data))
  return source
}

/** A safetensors file of this header, whatever it says. */
export function safetensors(header: string | Buffer, data: Uint8Array = new Uint8Array(), claimed?: bigint): Buffer {
  const text = Buffer.from(header)
  return Buffer.concat([u64(claimed ?? text.length), text, data])
}

/** The sound checkpoint with other bytes as its weights. */
export function weights(folder: string, bytes: Uint8Array): void {
  writeFileSync(join(checkpoint(folder), 'model.safetensors'), bytes)
}

/** One tensor of the sound checkpoint replaced by others, their data behind that of the rest. */
export function replaceTensor(
  { weights }: Parts,
  name: string,
  tensors: Record<string, { dtype: string; shape: number[]; data: Uint8Array }>,
): void {
  const { header, data } = weights
  const [from, to] = header[name]!.data_offsets
  delete header[name]
  for (const entry of Object.values(header)) {
    if (entry.data_offsets[0] >= to)
      entry.data_offsets = entry.data_offsets.map((at) => at - (to - from)) as [number, number]
  }
  const pieces = [data.subarray(0, from), data.subarray(to)]
  let end = data.length - (to - from)
  for (const [added, tensor] of Object.entries(tensors)) {
    header[added] = { dtype: tensor.dtype, shape: tensor.shape, data_offsets: [end, end + tensor.data.length] }
    pieces.push(Buffer.from(tensor.data))
    end += tensor.data.length
  }
  weights.data = Buffer.concat(pieces)
}

/** A named pipe: whoever opens it waits for somebody who writes. */
export function pipe(path: string): void {
  execFileSync('mkfifo', [path])
}

export function u32(value: number): Buffer {
  const bytes = Buffer.alloc(4)
  bytes.writeUInt32LE(value)
  return bytes
}

export function u64(value: bigint | number): Buffer {
  const bytes = Buffer.alloc(8)
  bytes.writeBigUInt64LE(BigInt(value))
  return bytes
}

// GGUF: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

const UINT32 = 4
const FLOAT32 = 6
const STRING = 8
const ARRAY = 9

export interface GgufFile {
  tensorCount?: bigint
  valueCount?: bigint
  values: Record<string, Buffer>
  tensors: { name: string; shape: (number | bigint)[]; type: number; offset: number | bigint }[]
  dataBytes: number
}

export const ggufText = (value: string): Buffer => Buffer.concat([u64(Buffer.byteLength(value)), Buffer.from(value)])
export const ggufString = (value: string): Buffer => Buffer.concat([u32(STRING), ggufText(value)])
export const ggufNumber = (value: number): Buffer => Buffer.concat([u32(UINT32), u32(value)])
export const ggufArray = (type: number, count: bigint | number, bytes: Buffer): Buffer =>
  Buffer.concat([u32(ARRAY), u32(type), u64(count), bytes])
export const ggufStrings = (values: string[]): Buffer =>
  ggufArray(STRING, values.length, Buffer.concat(values.map(ggufText)))
export const ggufFloats = (values: number[]): Buffer =>
  ggufArray(FLOAT32, values.length, Buffer.from(Float32Array.from(values).buffer))

/** A GGUF file that is a checkpoint as far as its header goes: llama, one block, three of its tensors. Written spoiled. */
export function gguf(folder: string, spoil: (file: GgufFile) => void = () => {}): void {
  const file: GgufFile = {
    values: {
      'general.architecture': ggufString('llama'),
      'llama.context_length': ggufNumber(64),
      'llama.embedding_length': ggufNumber(32),
      'llama.block_count': ggufNumber(1),
      'llama.feed_forward_length': ggufNumber(32),
      'llama.attention.head_count': ggufNumber(4),
      'llama.attention.head_count_kv': ggufNumber(2),
      'tokenizer.ggml.model': ggufString('llama'),
      'tokenizer.ggml.tokens': ggufStrings(['<unk>', '<s>', '</s>', 'a']),
      'tokenizer.ggml.scores': ggufFloats([0, 0, 0, -1]),
    },
    tensors: [
      { name: 'token_embd.weight', shape: [32, 4], type: 0, offset: 0 },
      { name: 'blk.0.attn_q.weight', shape: [32, 32], type: 8, offset: 512 },
      { name: 'blk.0.attn_k.weight', shape: [32, 16], type: 8, offset: 512 + 1088 },
    ],
    dataBytes: 512 + 1088 + 544,
  }
  spoil(file)
  const { values, tensors } = file
  const header = [
    Buffer.from('GGUF'),
    u32(3),
    u64(file.tensorCount ?? tensors.length),
    u64(file.valueCount ?? Object.keys(values).length),
    ...Object.entries(values).flatMap(([name, value]) => [ggufText(name), value]),
    ...tensors.flatMap(({ name, shape, type, offset }) => [
      ggufText(name),
      u32(shape.length),
      ...shape.map(u64),
      u32(type),
      u64(offset),
    ]),
  ]
  const bytes = Buffer.concat(header)
  const padding = Buffer.alloc((32 - (bytes.length % 32)) % 32)
  const source = join(folder, 'source')
  mkdirSync(source)
  writeFileSync(join(source, 'model.gguf'), Buffer.concat([bytes, padding, Buffer.alloc(file.dataBytes)]))
}

// PEFT folders

const MODULE = 'model.layers.0.self_attn.q_proj'
export const LORA_A = `base_model.model.${MODULE}.lora_A.weight`
export const LORA_B = `base_model.model.${MODULE}.lora_B.weight`

export interface AdapterParts {
  config: Record<string, unknown>
  shapes: Record<string, number[]>
}

/** Writes a PEFT folder with one module of rank 2, spoiled. Factors are zeros in f32. */
export function adapter(folder: string, spoil: (parts: AdapterParts) => void = () => {}): string {
  const config = { peft_type: 'LORA', r: 2, lora_alpha: 4, target_modules: ['q_proj'], bias: 'none' }
  const parts: AdapterParts = { config, shapes: { [LORA_A]: [2, 32], [LORA_B]: [32, 2] } }
  spoil(parts)
  const path = join(folder, 'adapter')
  mkdirSync(path)
  writeFileSync(join(path, 'adapter_config.json'), JSON.stringify(parts.config))
  const header: Safetensors['header'] = {}
  let end = 0
  for (const [name, shape] of Object.entries(parts.shapes)) {
    const bytes = 4 * shape.reduce((product, size) => product * size)
    header[name] = { dtype: 'F32', shape, data_offsets: [end, end + bytes] }
    end += bytes
  }
  writeFileSync(join(path, 'adapter_model.safetensors'), safetensors(JSON.stringify(header), Buffer.alloc(end)))
  return path
}

// Archives of torch.save: APPNOTE.TXT of PKWARE

export interface ZipEntry {
  name: string
  data: Buffer
  /** 0 is stored, 8 deflated. */
  method?: number
  /** What the directory says of its length. */
  claimed?: number
  /** Zip64: where the directory says that it begins. */
  offset?: bigint
}

export function zip(entries: ZipEntry[]): Buffer {
  const pieces: Buffer[] = []
  const directory: Buffer[] = []
  let at = 0
  for (const { name, data, method = 0, claimed = data.length, offset } of entries) {
    const fields = Buffer.alloc(26)
    fields.writeUInt16LE(20, 0)
    fields.writeUInt16LE(method, 4)
    fields.writeUInt32LE(crc32(data), 10)
    fields.writeUInt32LE(claimed, 14)
    fields.writeUInt32LE(claimed, 18)
    fields.writeUInt16LE(Buffer.byteLength(name), 22)
    const local = Buffer.concat([Buffer.from('PK\x03\x04'), fields, Buffer.from(name), data])
    const extra = offset === undefined ? Buffer.alloc(0) : Buffer.concat([Buffer.from([1, 0, 8, 0]), u64(offset)])
    fields.writeUInt16LE(extra.length, 24)
    const tail = Buffer.alloc(14)
    tail.writeUInt32LE(offset === undefined ? at : 0xffffffff, 10)
    directory.push(Buffer.concat([Buffer.from('PK\x01\x02\x14\x00'), fields, tail, Buffer.from(name), extra]))
    pieces.push(local)
    at += local.length
  }
  const listing = Buffer.concat(directory)
  const end = Buffer.alloc(18)
  end.writeUInt16LE(entries.length, 4)
  end.writeUInt16LE(entries.length, 6)
  end.writeUInt32LE(listing.length, 8)
  end.writeUInt32LE(at, 12)
  return Buffer.concat([...pieces, listing, Buffer.from('PK\x05\x06'), end])
}

function crc32(bytes: Buffer): number {
  let sum = 0xffffffff
  for (const byte of bytes) {
    sum ^= byte
    for (let bit = 0; bit < 8; bit++) sum = sum & 1 ? (sum >>> 1) ^ 0xedb88320 : sum >>> 1
  }
  return ~sum >>> 0
}

/** Text of a pickle: BINUNICODE. */
const pickled = (text: string): string => `X${u32(text.length).toString('latin1')}${text}`

/** The pickle of `torch.save({name: f32 tensor of [rows, columns] in storage 0, …})`. */
export function statePickle(tensors: Record<string, [number, number]>): Buffer {
  const storage = `(${pickled('storage')}ctorch\nFloatStorage\n${pickled('0')}${pickled('cpu')}K\x01tQ`
  const number = (value: number): string => `J${u32(value).toString('latin1')}`
  const entries = Object.entries(tensors).map(
    ([name, [rows, columns]]) =>
      `${pickled(name)}ctorch._utils\n_rebuild_tensor_v2\n(${storage}K\x00${number(rows)}${number(columns)}\x86` +
      `${number(columns)}K\x01\x86\x89ccollections\nOrderedDict\n)RtR`,
  )
  return Buffer.from(`\x80\x02}(${entries.join('')}u.`, 'latin1')
}

/** A PEFT folder with this file as `adapter_model.bin`. */
export function torchAdapter(folder: string, file: Buffer): void {
  const path = join(folder, 'adapter')
  mkdirSync(path)
  const config = { peft_type: 'LORA', r: 2, lora_alpha: 4, target_modules: ['q_proj'], bias: 'none' }
  writeFileSync(join(path, 'adapter_config.json'), JSON.stringify(config))
  writeFileSync(join(path, 'adapter_model.bin'), file)
}
