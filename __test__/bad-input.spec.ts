import { cpSync, mkdirSync, readdirSync, readFileSync, renameSync, rmSync, truncateSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'

import test, { type ExecutionContext } from 'ava'
import { compress, type CompressOptions, type ErrorCode, loadModel } from 'kintsugi'

import { failsWith, readSafetensors, SHORT_CALIBRATION, temporaryFolder, TINY, writeSafetensors } from './fixtures.js'

const WEIGHTS = 'model.safetensors'

/** A copy of a small checkpoint and the place where a compressed one would go. */
function workshop(t: ExecutionContext): { source: string; folder: string; out: string } {
  const folder = temporaryFolder(t)
  const source = join(folder, 'source')
  cpSync(TINY, source, { recursive: true })
  return { source, folder, out: join(folder, 'out') }
}

/** Asserts that compressing is refused with `code` and that nothing is added beside the source. */
async function refuses(
  t: ExecutionContext,
  { source, folder, out }: ReturnType<typeof workshop>,
  code: ErrorCode,
  subject: string | RegExp,
  options: Partial<CompressOptions> = {},
): Promise<void> {
  const before = readdirSync(folder, { recursive: true }).sort()
  const given = { out, groupSize: 64, calibration: SHORT_CALIBRATION, ...options }
  await failsWith(t, () => compress(source, given), code, subject)
  t.deepEqual(readdirSync(folder, { recursive: true }).sort(), before, 'something was left behind')
}

function changeConfig(source: string, change: Record<string, unknown>): void {
  const path = join(source, 'config.json')
  writeFileSync(path, JSON.stringify({ ...JSON.parse(readFileSync(path, 'utf8')), ...change }))
}

test('missing shard', async (t) => {
  const shop = workshop(t)
  const names = Object.keys(readSafetensors(join(shop.source, WEIGHTS)).header)
  const [present, missing] = ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
  renameSync(join(shop.source, WEIGHTS), join(shop.source, present))
  const weight_map = Object.fromEntries(names.map((name, i) => [name, i ? present : missing]))
  writeFileSync(join(shop.source, 'model.safetensors.index.json'), JSON.stringify({ weight_map }))
  await refuses(t, shop, 'ERR_CHECKPOINT_SHARD_MISSING', /model-00002-of-00002\.safetensors/)
})

test('missing weights', async (t) => {
  const shop = workshop(t)
  rmSync(join(shop.source, WEIGHTS))
  await refuses(t, shop, 'ERR_CHECKPOINT_NOT_FOUND', /source/)
})

test('truncated safetensors', async (t) => {
  const shop = workshop(t)
  truncateSync(join(shop.source, WEIGHTS), 1_000_000)
  await refuses(t, shop, 'ERR_CHECKPOINT_CORRUPT', /model\.safetensors/)
})

test('file that is too short for a header', async (t) => {
  const shop = workshop(t)
  truncateSync(join(shop.source, WEIGHTS), 5)
  await refuses(t, shop, 'ERR_CHECKPOINT_CORRUPT', /model\.safetensors/)
})

test('header longer than the file', async (t) => {
  const shop = workshop(t)
  for (const length of [10_000_000, 2 ** 52]) {
    writeSafetensors(join(shop.source, WEIGHTS), readSafetensors(join(TINY, WEIGHTS)), length)
    await refuses(t, shop, 'ERR_CHECKPOINT_CORRUPT', /model\.safetensors/)
  }
})

test('overlapping offsets', async (t) => {
  const shop = workshop(t)
  const parts = readSafetensors(join(shop.source, WEIGHTS))
  const entries = Object.values(parts.header).sort((a, b) => a.data_offsets[0] - b.data_offsets[0])
  const second = entries[1]!
  second.data_offsets = [second.data_offsets[0] - 4, second.data_offsets[1] - 4]
  writeSafetensors(join(shop.source, WEIGHTS), parts)
  await refuses(t, shop, 'ERR_CHECKPOINT_CORRUPT', /model\.safetensors/)
})

test('NaN and infinite weights', async (t) => {
  const shop = workshop(t)
  for (const value of [Number.NaN, Number.POSITIVE_INFINITY]) {
    const parts = readSafetensors(join(TINY, WEIGHTS))
    const data = Buffer.from(parts.data)
    const name = 'model.layers.1.mlp.down_proj.weight'
    data.writeFloatLE(value, parts.header[name]!.data_offsets[0] + 4 * 1000)
    writeSafetensors(join(shop.source, WEIGHTS), { ...parts, data })
    await refuses(t, shop, 'ERR_CHECKPOINT_NOT_FINITE', /model\.layers\.1\.mlp\.down_proj/)
  }
})

test('weights of another shape', async (t) => {
  const shop = workshop(t)
  changeConfig(shop.source, { intermediate_size: 512 })
  await refuses(t, shop, 'ERR_CHECKPOINT_SHAPE', /mlp/)
})

test('missing tensor', async (t) => {
  const shop = workshop(t)
  changeConfig(shop.source, { num_hidden_layers: 3 })
  await refuses(t, shop, 'ERR_CHECKPOINT_TENSOR_MISSING', /model\.layers\.2/)
})

test('unknown architecture', async (t) => {
  const shop = workshop(t)
  changeConfig(shop.source, { architectures: ['BloomForCausalLM'], model_type: 'bloom' })
  await refuses(t, shop, 'ERR_CONFIG_ARCHITECTURE', /BloomForCausalLM|config\.json/)
})

test('config that is no JSON, or missing', async (t) => {
  const shop = workshop(t)
  writeFileSync(join(shop.source, 'config.json'), '{"architectures": [')
  await refuses(t, shop, 'ERR_CONFIG_INVALID', /config\.json/)
  rmSync(join(shop.source, 'config.json'))
  await refuses(t, shop, 'ERR_CONFIG_INVALID', /config\.json/)
})

test('wrong tokenizer', async (t) => {
  const shop = workshop(t)
  // That of another model has more tokens than this one has rows in its embedding.
  cpSync(join(TINY, '../llama-7m/tokenizer.json'), join(shop.source, 'tokenizer.json'))
  await refuses(t, shop, 'ERR_TOKENIZER_INVALID', /tokenizer\.json/)
  writeFileSync(join(shop.source, 'tokenizer.json'), '{}')
  await refuses(t, shop, 'ERR_TOKENIZER_INVALID', /tokenizer\.json/)
  rmSync(join(shop.source, 'tokenizer.json'))
  await refuses(t, shop, 'ERR_TOKENIZER_INVALID', /tokenizer\.json/)
})

test('unwritable output', async (t) => {
  const shop = workshop(t)
  const file = join(shop.folder, 'file')
  writeFileSync(file, 'in the way')
  await refuses(t, shop, 'ERR_OUTPUT_UNWRITABLE', /file/, { out: join(file, 'out') })
})

test('output that is not empty', async (t) => {
  const shop = workshop(t)
  mkdirSync(shop.out)
  writeFileSync(join(shop.out, 'precious.txt'), 'mine')
  await refuses(t, shop, 'ERR_OUTPUT_NOT_EMPTY', /out/)
  t.is(readFileSync(join(shop.out, 'precious.txt'), 'utf8'), 'mine')
})

test('the source is never the output', async (t) => {
  const shop = workshop(t)
  await refuses(t, shop, 'ERR_OUTPUT_NOT_EMPTY', /source/, { out: shop.source })
})

test('empty, short, unreadable and undecodable calibration text', async (t) => {
  const shop = workshop(t)
  const text = join(shop.folder, 'text.txt')
  const calibration = { ...SHORT_CALIBRATION, text }
  await refuses(t, shop, 'ERR_TEXT_UNREADABLE', /text\.txt/, { calibration })
  writeFileSync(text, '')
  await refuses(t, shop, 'ERR_TEXT_TOO_SHORT', /text\.txt/, { calibration })
  writeFileSync(text, 'Once upon a time')
  await refuses(t, shop, 'ERR_TEXT_TOO_SHORT', /text\.txt/, { calibration })
  writeFileSync(text, Buffer.from([0x4f, 0x6e, 0xff, 0xfe]))
  await refuses(t, shop, 'ERR_TEXT_UNREADABLE', /text\.txt/, { calibration })
  // Read and checked even where the method has no use for it.
  await refuses(t, shop, 'ERR_TEXT_UNREADABLE', /text\.txt/, { calibration, method: 'rtn' })
})

test('options that do not fit', async (t) => {
  const shop = workshop(t)
  await refuses(t, shop, 'ERR_OPTION_UNKNOWN', 'grupSize', { grupSize: 64 } as Partial<CompressOptions>)
  await refuses(t, shop, 'ERR_OPTION_INVALID', 'bits', { bits: 7 } as unknown as Partial<CompressOptions>)
  await refuses(t, shop, 'ERR_OPTION_INVALID', 'method', { method: 'gtpq' } as unknown as Partial<CompressOptions>)
  await refuses(t, shop, 'ERR_OPTION_INVALID', 'eora.rank', { eora: { rank: 0 } })
  const { source, out } = shop
  await failsWith(t, () => compress(source, { out }), 'ERR_OPTION_INVALID', 'calibration.file')
  await failsWith(
    t,
    () => compress(source, { out, method: 'rtn', eora: { rank: 4 } }),
    'ERR_OPTION_INVALID',
    'calibration.file',
  )
  t.deepEqual(readdirSync(shop.folder), ['source'])
})

test('a checkpoint that is compressed already', async (t) => {
  const shop = workshop(t)
  await compress(shop.source, { out: shop.out, method: 'rtn' })
  await refuses(
    t,
    { ...shop, source: shop.out, out: join(shop.folder, 'twice') },
    'ERR_QUANTIZATION_UNSUPPORTED',
    /out/,
  )
})

test('loading refuses the same damage', async (t) => {
  const shop = workshop(t)
  await failsWith(t, () => loadModel(join(shop.folder, 'nothing')), 'ERR_CHECKPOINT_NOT_FOUND', /nothing/)
  rmSync(join(shop.source, 'tokenizer.json'))
  await failsWith(t, () => loadModel(shop.source), 'ERR_TOKENIZER_INVALID', /tokenizer\.json/)
})
