import { copyFileSync, readdirSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'

import test from 'ava'
import { Checkpoint, compress, loadModel } from 'kintsugi'

import { failsWith, ROOT, STORIES, temporaryFolder, textSlice, TINY } from './fixtures.js'

/** `assets/tinystories-656k` as llama.cpp's own package writes it (`vectors/make_gguf.py`). */
const GGUF = join(ROOT, '__test__/vectors/gguf/tinystories-656k.gguf')

test('a GGUF file is a checkpoint', async (t) => {
  const { info } = await Checkpoint.open(GGUF)
  t.like(info, {
    path: GGUF,
    architecture: 'LlamaForCausalLM',
    parameters: 656_000,
    quantization: { format: 'gguf', bits: 8, groupSize: 32, symmetric: true },
    canRun: true,
    canCompress: false,
    reason: 'it is compressed already, so compress does not take it',
    notices: [],
  })
  t.deepEqual(Object.keys(info.dtypes).sort(), ['f16', 'f32', 'q5_0', 'q5_1', 'q8_0'])
  t.true(info.bitsPerWeight! > 6 && info.bitsPerWeight! < 12, String(info.bitsPerWeight))
})

test('a compression ends in a GGUF file on the grid of its type', async (t) => {
  const folder = temporaryFolder(t)
  const options = { method: 'rtn', format: 'gguf:Q4_0' } as const
  const plan = await compress(TINY, { ...options, out: join(folder, 'plan'), dryRun: true })
  t.like(plan.recipe, { bits: 4, groupSize: 32, symmetric: true, scaleType: 'f16' })
  const out = join(folder, 'out')
  const { summary } = await compress(TINY, { ...options, out })
  t.is(summary.format, 'gguf:Q4_0')
  t.is(summary.bitsPerWeight, 4.5)
  t.regex(summary.notices.join('\n'), /^llama\.cpp may cut some texts otherwise: [^\n]+$/)
  t.deepEqual(readdirSync(out).sort(), ['model.gguf', 'report.json'])
  const { info } = await Checkpoint.open(out)
  t.like(info.quantization, { format: 'gguf', bits: 4, groupSize: 32, symmetric: true })
  using model = await loadModel(join(out, 'model.gguf'))
  t.not(await model.generate('Once upon a time', { maxTokens: 8 }).text(), '')
  const { recipe } = await compress(TINY, { ...options, format: 'gguf:Q8_0', out: join(folder, 'plan'), dryRun: true })
  t.is(recipe.bits, 8)
  const wider = { ...options, out: join(folder, 'wider'), groupSize: 64 }
  await failsWith(t, () => compress(TINY, wider), 'ERR_QUANTIZATION_UNSUPPORTED', 'model.layers.0.self_attn.q_proj')
  const other = { ...options, out: join(folder, 'other'), format: 'gguf:Q4_K' as 'gguf:Q4_0' }
  await failsWith(t, () => compress(TINY, other), 'ERR_OPTION_UNKNOWN', 'format')
})

test('it predicts and writes like the checkpoint that it was made from', async (t) => {
  const text = textSlice(STORIES, 20_000)
  const of = async (path: string): Promise<{ perplexity: number; text: string }> => {
    using model = await loadModel(path, { precision: 'f32' })
    const { perplexity } = await model.perplexity(text, { length: 128 })
    let story = ''
    for await (const piece of model.generate('Once upon a time', { maxTokens: 24, temperature: 0 })) story += piece.text
    return { perplexity, text: story }
  }
  const [original, gguf] = [await of(TINY), await of(GGUF)]
  t.true(Math.abs(gguf.perplexity / original.perplexity - 1) < 0.01, `${gguf.perplexity} ${original.perplexity}`)
  t.not(gguf.perplexity, original.perplexity)
  t.is(gguf.text.slice(0, 20), original.text.slice(0, 20))
})

test('a folder with one GGUF file is that file, one with two is refused', async (t) => {
  const folder = temporaryFolder(t)
  copyFileSync(GGUF, join(folder, 'model.gguf'))
  t.is((await Checkpoint.open(folder)).info.architecture, 'LlamaForCausalLM')
  copyFileSync(GGUF, join(folder, 'second.gguf'))
  await failsWith(t, () => Checkpoint.open(folder), 'ERR_CHECKPOINT_NOT_FOUND', folder)
  t.is((await Checkpoint.open(join(folder, 'second.gguf'))).info.tensors, 20)
})

test('a damaged file is an error with its name', async (t) => {
  const path = join(temporaryFolder(t), 'broken.gguf')
  writeFileSync(path, 'GGUF and nothing else')
  await failsWith(t, () => loadModel(path), 'ERR_CHECKPOINT_DTYPE', path)
})
