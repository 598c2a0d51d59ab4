import { getEventListeners } from 'node:events'

import test from 'ava'

import { KintsugiError } from '../src/errors.js'
import { Generation, type GenerationSource, type GenerationSummary, type Piece } from '../src/generation.js'

const SUMMARY: GenerationSummary = {
  promptTokens: 2,
  tokens: 3,
  finishReason: 'length',
  secondsPrefill: 0.1,
  secondsDecode: 0.2,
}

/** Gives `count` pieces, one per millisecond, and counts the calls that overlap. */
class FakeSource implements GenerationSource {
  cancelled = false
  active = 0
  largestActive = 0
  #given = 0

  constructor(readonly count: number) {}

  async next(): Promise<Piece | null> {
    this.largestActive = Math.max(this.largestActive, ++this.active)
    await new Promise((resolve) => setTimeout(resolve, 1))
    this.active--
    if (this.cancelled)
      throw new Error(JSON.stringify({ code: 'ERR_CANCELLED', message: 'cancelled', subject: '', hint: '' }))
    return this.#given < this.count ? { text: `t${this.#given}`, token: this.#given++ } : null
  }

  async summary(): Promise<GenerationSummary> {
    return SUMMARY
  }

  cancel(): void {
    this.cancelled = true
  }
}

test('pieces come in order, then the summary is there', async (t) => {
  const generation = new Generation(new FakeSource(3), [])
  t.is(generation.summary, undefined)
  const pieces: Piece[] = []
  for await (const piece of generation) pieces.push(piece)
  t.deepEqual(
    pieces.map(({ token }) => token),
    [0, 1, 2],
  )
  t.deepEqual(generation.summary, SUMMARY)
  t.deepEqual(await generation.next(), { done: true, value: undefined })
})

test('text() joins the pieces that are left', async (t) => {
  const generation = new Generation(new FakeSource(3), [])
  await generation.next()
  t.is(await generation.text(), 't1t2')
})

test('calls that overlap reach the addon one after the other', async (t) => {
  const source = new FakeSource(4)
  const generation = new Generation(source, [])
  const results = await Promise.all(Array.from({ length: 6 }, () => generation.next()))
  t.deepEqual(
    results.map(({ value }) => value?.token),
    [0, 1, 2, 3, undefined, undefined],
  )
  t.is(source.largestActive, 1)
})

test('leaving the loop cancels the work', async (t) => {
  const source = new FakeSource(1000)
  const generation = new Generation(source, [])
  for await (const { token } of generation) if (token === 2) break
  t.true(source.cancelled)
  t.true((await generation.next()).done)
  t.is(generation.summary, undefined)
})

test('an abort between and during steps rejects with its reason and leaves no listener', async (t) => {
  for (const during of [false, true]) {
    const source = new FakeSource(1000)
    const controller = new AbortController()
    const generation = new Generation(source, [controller.signal])
    await generation.next()
    const reason = new Error('gone')
    let step: Promise<unknown> | undefined
    if (during) step = generation.next()
    await Promise.resolve()
    controller.abort(reason)
    step ??= generation.next()
    t.is(await t.throwsAsync(step as Promise<never>), reason)
    t.true(source.cancelled)
    t.is(getEventListeners(controller.signal, 'abort').length, 0)
    t.true((await generation.next()).done)
  }
})

test('a failure is typed and ends the generation', async (t) => {
  const source = new FakeSource(1)
  source.next = async () => {
    throw new Error(JSON.stringify({ code: 'ERR_CONTEXT_EXCEEDED', message: 'too long', subject: 'prompt', hint: 'x' }))
  }
  const generation = new Generation(source, [])
  const error = await t.throwsAsync(generation.next(), { instanceOf: KintsugiError })
  t.is((error as KintsugiError).code, 'ERR_CONTEXT_EXCEEDED')
  t.true((await generation.next()).done)
})
