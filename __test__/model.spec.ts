import { readFileSync } from 'node:fs'
import { join } from 'node:path'

import test from 'ava'
import { compress, KintsugiError, loadModel } from 'kintsugi'

import { CALIBRATION_TEXT, failsWith, LLAMA, SHAKESPEARE, SHAKESPEARE_TEXT, STORIES, temporaryFolder, textSlice, TINY, WIKITEXT } from './fixtures.js'

const PROMPT = 'Once upon a time'

test('what was loaded', async (t) => {
  using model = await loadModel(LLAMA, { adapters: { shakespeare: SHAKESPEARE } })
  t.like(model.info, {
    architecture: 'LlamaForCausalLM',
    layers: 8,
    hiddenSize: 256,
    contextLength: 512,
    precision: 'exact',
    backend: 'cpu',
    adapters: ['shakespeare'],
  })
  t.true(model.info.memoryBytes > 0)
})

test('perplexity in f32 is the published value', async (t) => {
  t.timeout(600_000)
  using model = await loadModel(LLAMA, { precision: 'f32' })
  // Longer texts are measured by crates/model/tests/reference.rs.
  const report = await model.perplexity(readFileSync(SHAKESPEARE_TEXT, 'utf8'), { length: 256 })
  t.is(report.windows, 100)
  t.is(report.tokens, 25_500)
  t.is(report.length, 256)
  t.true(Math.abs(report.perplexity / 88.04405 - 1) < 1e-3, String(report.perplexity))
  t.is(report.perplexity, Math.exp(report.meanNegativeLogLikelihood))
})

test('both backends and both precisions agree', async (t) => {
  const text = textSlice(STORIES, 20_000)
  const measure = async (options: Parameters<typeof loadModel>[1]): Promise<number> => {
    using model = await loadModel(TINY, options)
    return (await model.perplexity(text, { length: 128 })).perplexity
  }
  const reference = await measure({ backend: 'candle', precision: 'f32' })
  t.true(Math.abs((await measure({ precision: 'f32' })) / reference - 1) < 1e-4)
  t.true(Math.abs((await measure({ precision: 'exact' })) / reference - 1) < 1e-2)
})

test('int8 activations hardly change the predictions of a model of 4 bits', async (t) => {
  t.timeout(600_000)
  const out = join(temporaryFolder(t), 'w4')
  await compress(LLAMA, { out, method: 'rtn', bits: 4, groupSize: 64 })
  const text = textSlice(WIKITEXT, 60_000)
  const figures: Record<string, number> = {}
  for (const precision of ['f32', 'fast'] as const) {
    using model = await loadModel(out, { precision })
    // The 56 Linears of the blocks; the head is plain.
    t.is(model.info.arithmetic.int8, precision === 'fast' ? 56 : undefined)
    figures[precision] = (await model.perplexity(text, { length: 256 })).perplexity
  }
  const ratio = (figures.fast ?? NaN) / (figures.f32 ?? NaN)
  t.true(Math.abs(ratio - 1) < 5e-3, String(ratio))
})

test('a compensation is worth as much in int8', async (t) => {
  const out = join(temporaryFolder(t), 'w3')
  const calibration = { text: CALIBRATION_TEXT, sequences: 16, length: 128 }
  await compress(TINY, { out, method: 'rtn', bits: 3, groupSize: 64, calibration, eora: { rank: 16 } })
  const text = textSlice(STORIES, 20_000)
  const figures: Record<string, number> = {}
  for (const [name, options] of [
    ['f32', { precision: 'f32' }],
    ['fast', { precision: 'fast' }],
    ['without', { precision: 'fast', compensation: false }],
  ] as const) {
    using model = await loadModel(out, options)
    figures[name] = (await model.perplexity(text, { length: 128 })).perplexity
  }
  const { f32 = NaN, fast = NaN, without = NaN } = figures
  t.true(Math.abs(fast / f32 - 1) < 5e-3, `${fast} beside ${f32}`)
  t.true(without / fast > 1.05, `${without} without`)
})

test('divergence is nothing from itself, and grows with the damage', async (t) => {
  const text = textSlice(STORIES, 20_000)
  const folder = temporaryFolder(t)
  using original = await loadModel(TINY)
  const itself = await original.divergence(original, text, { length: 128 })
  t.is(itself.meanKlDivergence, 0)
  t.is(itself.top1Agreement, 1)
  const { perplexity, tokens } = await original.perplexity(text, { length: 128 })
  t.true(Math.abs(itself.perplexity / perplexity - 1) < 1e-12 && itself.referencePerplexity === itself.perplexity)
  t.is(itself.tokens, tokens)

  let worse = itself
  for (const bits of [8, 4, 2] as const) {
    const out = join(folder, `w${bits}`)
    await compress(TINY, { out, method: 'rtn', bits, groupSize: 64 })
    using model = await loadModel(out)
    const report = await model.divergence(original, text, { length: 128 })
    t.true(report.meanKlDivergence > worse.meanKlDivergence, `${bits} bits`)
    t.true(report.top1Agreement < worse.top1Agreement, `${bits} bits`)
    t.true(report.p99KlDivergence > report.meanKlDivergence)
    worse = report
  }

  using other = await loadModel(LLAMA)
  await failsWith(t, () => other.divergence(original, text, { length: 128 }), 'ERR_TOKENIZER_INVALID', 'reference')
})

test('an adapter is applied to the calls that name it', async (t) => {
  using model = await loadModel(LLAMA, { adapters: { shakespeare: SHAKESPEARE } })
  const text = textSlice(SHAKESPEARE.replace('adapters/shakespeare', 'text/eval-shakespeare.txt'), 15_000)
  const without = await model.perplexity(text, { length: 256 })
  const with_ = await model.perplexity(text, { length: 256, adapter: 'shakespeare' })
  t.true(with_.perplexity < 0.9 * without.perplexity, `${with_.perplexity} ${without.perplexity}`)
  const prompt = 'ROMEO:'
  t.not(
    await model.generate(prompt, { maxTokens: 24, adapter: 'shakespeare' }).text(),
    await model.generate(prompt, { maxTokens: 24 }).text(),
  )
  await failsWith(t, () => model.perplexity(text, { adapter: 'legal' }), 'ERR_ADAPTER_UNKNOWN', /legal/)
  await failsWith(t, () => model.generate(prompt, { adapter: 'legal' }).text(), 'ERR_ADAPTER_UNKNOWN', /legal/)
})

test('greedy text is the same every time and reads like a story', async (t) => {
  using model = await loadModel(TINY, { precision: 'f32' })
  const generation = model.generate(PROMPT, { maxTokens: 24 })
  const text = await generation.text()
  t.regex(text, /^, a little girl named Lily lived in a small house/)
  t.is(await model.generate(PROMPT, { maxTokens: 24 }).text(), text)
  const { summary } = generation
  t.like(summary, { tokens: 24, finishReason: 'length' })
  t.true(summary!.promptTokens > 0 && summary!.secondsPrefill > 0 && summary!.secondsDecode > 0)
})

test('a seed makes sampling repeatable', async (t) => {
  using model = await loadModel(TINY)
  const sample = (seed: number): Promise<string> =>
    model.generate(PROMPT, { maxTokens: 32, temperature: 1.2, topK: 200, topP: 0.98, minP: 0.001, seed }).text()
  t.is(await sample(1), await sample(1))
  t.not(await sample(1), await sample(2))
})

test('generations that run side by side do not touch each other', async (t) => {
  using model = await loadModel(TINY, { precision: 'f32' })
  const prompts = [PROMPT, 'The dog', 'One day, Tom']
  const alone: string[] = []
  for (const prompt of prompts) alone.push(await model.generate(prompt, { maxTokens: 16 }).text())
  const together = await Promise.all(prompts.map((prompt) => model.generate(prompt, { maxTokens: 16 }).text()))
  t.deepEqual(together, alone)
})

test('a stop string ends the text before it', async (t) => {
  using model = await loadModel(TINY, { precision: 'f32' })
  const whole = await model.generate(PROMPT, { maxTokens: 24 }).text()
  const stop = whole.slice(8, 14)
  for (const given of [stop, ['never appears', stop]]) {
    const generation = model.generate(PROMPT, { maxTokens: 24, stop: given })
    t.is(await generation.text(), whole.slice(0, whole.indexOf(stop)))
    t.is(generation.summary?.finishReason, 'stop')
  }
})

test('pieces hold whole characters only', async (t) => {
  using model = await loadModel(TINY)
  // Hot sampling from a byte-fallback vocabulary gives stray bytes and characters of several tokens.
  let text = ''
  for await (const piece of model.generate(PROMPT, { maxTokens: 200, temperature: 50, seed: 3, ignoreEos: true })) {
    t.is(piece.text, Buffer.from(piece.text).toString())
    t.false(/[\uD800-\uDBFF]$/.test(piece.text))
    text += piece.text
  }
  t.is(text, await model.generate(PROMPT, { maxTokens: 200, temperature: 50, seed: 3, ignoreEos: true }).text())
})

test('an abort in the middle ends the generation with its reason', async (t) => {
  using model = await loadModel(TINY)
  const controller = new AbortController()
  const reason = new Error('reader left')
  const generation = model.generate(PROMPT, { maxTokens: 400, ignoreEos: true, signal: controller.signal })
  let pieces = 0
  const error = await t.throwsAsync(async () => {
    for await (const _ of generation) if (++pieces === 5) controller.abort(reason)
  })
  t.is(error, reason)
  t.is(pieces, 5)
})

test('an aborted measurement ends soon', async (t) => {
  using model = await loadModel(LLAMA)
  const started = performance.now()
  const job = model.perplexity(readFileSync(WIKITEXT, 'utf8'), { length: 256, signal: AbortSignal.timeout(300) })
  await t.throwsAsync(async () => job, { any: true, name: 'TimeoutError' })
  t.true(performance.now() - started < 5000)
})

test('input that does not fit is refused by name', async (t) => {
  using model = await loadModel(TINY)
  await failsWith(t, () => model.generate(PROMPT, { maxTokens: 0 }), 'ERR_OPTION_INVALID', 'maxTokens')
  await failsWith(t, () => model.generate(PROMPT, { maxTokns: 3 } as object), 'ERR_OPTION_UNKNOWN', 'maxTokns')
  await failsWith(t, () => model.generate(3 as unknown as string), 'ERR_OPTION_INVALID', 'prompt')
  await failsWith(t, () => model.generate('word '.repeat(2000)).text(), 'ERR_CONTEXT_EXCEEDED', 'prompt')
  await failsWith(t, () => model.perplexity(''), 'ERR_TEXT_TOO_SHORT', 'text')
  await failsWith(t, () => model.perplexity('Once', { length: 512 }), 'ERR_TEXT_TOO_SHORT', 'text')
  await failsWith(t, () => model.perplexity('Once', { length: 4096 }), 'ERR_CONTEXT_EXCEEDED', 'length')
  await failsWith(t, () => model.perplexity('Once', { lenght: 1 } as object), 'ERR_OPTION_UNKNOWN', 'lenght')
  const wrong = { precision: 'int8' } as unknown as Parameters<typeof loadModel>[1]
  const error = await failsWith(t, () => loadModel(TINY, wrong), 'ERR_OPTION_INVALID', 'precision')
  t.regex(error?.hint ?? '', /f32/)
  await failsWith(t, () => loadModel(TINY, { adapters: { a: '/no/such/adapter' } }), 'ERR_ADAPTER_INVALID', /adapter/)
})

test('a model that was disposed of is gone', async (t) => {
  const model = await loadModel(TINY)
  model.dispose()
  model.dispose()
  await failsWith(t, () => model.info, 'ERR_DISPOSED')
  await failsWith(t, () => model.generate(PROMPT), 'ERR_DISPOSED')
  await failsWith(t, () => model.perplexity(PROMPT), 'ERR_DISPOSED')
})

test('disposing ends what still runs', async (t) => {
  const model = await loadModel(LLAMA)
  const measurement = model.perplexity(readFileSync(WIKITEXT, 'utf8'), { length: 256 })
  const generation = model.generate(PROMPT, { maxTokens: 400, ignoreEos: true })
  await generation.next()
  const rest = generation.text()
  await model[Symbol.asyncDispose]()
  for (const outcome of await Promise.allSettled([measurement, rest])) {
    t.is(outcome.status, 'rejected')
    t.is(((outcome as PromiseRejectedResult).reason as KintsugiError).code, 'ERR_DISPOSED')
  }
})
