import { join } from 'node:path'
import { monitorEventLoopDelay } from 'node:perf_hooks'

import test from 'ava'
import { compress, loadModel, QuantizedLinear } from 'kintsugi'

import { CALIBRATION_TEXT, gaussian, LLAMA, temporaryFolder, textSlice, WIKITEXT } from '../fixtures.js'

const LARGEST_EXTRA_MILLISECONDS = 10

/** 99th percentile of the event-loop delay, in milliseconds, while `work` runs. */
async function delayDuring(work: () => Promise<unknown>): Promise<number> {
  const histogram = monitorEventLoopDelay({ resolution: 1 })
  histogram.enable()
  await work()
  histogram.disable()
  return histogram.percentile(99) / 1e6
}

function idle(milliseconds: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, milliseconds))
}

test('no long call blocks the event loop', async (t) => {
  const folder = temporaryFolder(t)
  const calibration = { text: CALIBRATION_TEXT, sequences: 16, length: 256 }
  const text = textSlice(WIKITEXT, 40_000)
  const baseline = await delayDuring(() => idle(2000))

  const compressing = await delayDuring(async () => {
    const options = { bits: 2, groupSize: 64, calibration, eora: { rank: 16 } } as const
    const job = compress(LLAMA, { ...options, out: join(folder, 'w2') })
    for await (const _ of job.progress());
    await job
  })
  // So short that one hiccup of the machine is the 99th percentile; a load that blocks does so every time.
  const loads: number[] = []
  for (let i = 0; i < 3; i++) {
    const delay = await delayDuring(async () => {
      using model = await loadModel(LLAMA)
      await idle(100)
      t.truthy(model.info)
    })
    loads.push(delay)
  }
  const loading = Math.min(...loads)
  using model = await loadModel(LLAMA)
  const measuring = await delayDuring(() => Promise.resolve(model.perplexity(text, { length: 256 })))
  const generating = await delayDuring(() => model.generate('Once', { maxTokens: 200, ignoreEos: true }).text())
  using layer = QuantizedLinear.quantize(gaussian(1024 * 1024, 1), { outFeatures: 1024, inFeatures: 1024 })
  const x = gaussian(512 * 1024, 2)
  const multiplying = await delayDuring(async () => {
    for (let i = 0; i < 10; i++) await layer.forwardAsync(x)
  })

  const delays = { baseline, compressing, loading, measuring, generating, multiplying }
  t.log(
    Object.entries(delays)
      .map(([name, delay]) => `${name} ${delay.toFixed(2)} ms`)
      .join(', '),
  )
  for (const [name, delay] of Object.entries(delays)) {
    t.true(delay <= baseline + LARGEST_EXTRA_MILLISECONDS, `${name}: ${delay} ms, idle ${baseline} ms`)
  }
})
