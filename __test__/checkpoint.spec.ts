import { cpSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'

import test from 'ava'
import { Checkpoint } from 'kintsugi'

import { failsWith, LLAMA, readSafetensors, temporaryFolder, TINY, writeSafetensors } from './fixtures.js'

test('a checkpoint says what it is', async (t) => {
  const { info, path } = await Checkpoint.open(LLAMA)
  t.is(path, LLAMA)
  t.is(info.architecture, 'LlamaForCausalLM')
  t.is(info.parameters, 7_344_384)
  t.deepEqual(Object.keys(info.dtypes), ['bf16'])
  t.is(info.bytes, 2 * 7_344_384)
  t.is(info.linears, 56)
  t.is(info.bitsPerWeight, 16)
  t.is(info.quantization, null)
  t.is(info.compensation, null)
  t.like(info.spec, { layers: 8, hiddenSize: 256, intermediateSize: 768, heads: 8, kvHeads: 4, tiedHead: true })
  t.true(info.canCompress)
  t.true(info.canRun)
  t.is(info.reason, null)
  t.deepEqual(info.notices, [])
})

test('an architecture that is not supported is an answer', async (t) => {
  const folder = temporaryFolder(t)
  cpSync(TINY, folder, { recursive: true })
  const config = JSON.parse(readFileSync(join(folder, 'config.json'), 'utf8'))
  writeFileSync(join(folder, 'config.json'), JSON.stringify({ ...config, architectures: ['BloomForCausalLM'] }))
  const { info } = await Checkpoint.open(folder)
  t.is(info.architecture, 'BloomForCausalLM')
  t.false(info.canRun)
  t.false(info.canCompress)
  t.regex(info.reason ?? '', /BloomForCausalLM/)
})

test('a checkpoint in several shards is one', async (t) => {
  const folder = temporaryFolder(t)
  cpSync(TINY, folder, { recursive: true })
  const whole = readSafetensors(join(folder, 'model.safetensors'))
  const names = Object.keys(whole.header).sort()
  const index: Record<string, string> = {}
  const shards = [names.slice(0, 5), names.slice(5)]
  for (const [number, members] of shards.entries()) {
    const file = `model-0000${number + 1}-of-00002.safetensors`
    const header: typeof whole.header = {}
    const parts: Buffer[] = []
    let offset = 0
    for (const name of members) {
      const entry = whole.header[name]!
      const [start, end] = entry.data_offsets
      parts.push(whole.data.subarray(start, end))
      header[name] = { ...entry, data_offsets: [offset, offset + end - start] }
      offset += end - start
      index[name] = file
    }
    writeSafetensors(join(folder, file), { header, data: Buffer.concat(parts) })
  }
  writeFileSync(join(folder, 'model.safetensors.index.json'), JSON.stringify({ weight_map: index }))
  rmSync(join(folder, 'model.safetensors'))
  const [sharded, single] = await Promise.all([Checkpoint.open(folder), Checkpoint.open(TINY)])
  t.is(sharded.info.tensors, single.info.tensors)
  t.is(sharded.info.bytes, single.info.bytes)
})

test('a folder that is not there is refused', async (t) => {
  await failsWith(t, () => Checkpoint.open('/no/such/folder'), 'ERR_CHECKPOINT_NOT_FOUND', /\/no\/such\/folder/)
  await failsWith(t, () => Checkpoint.open(''), 'ERR_OPTION_INVALID', 'path')
})
