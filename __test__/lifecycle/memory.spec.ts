import test from 'ava'
import { loadModel, QuantizedLinear } from 'kintsugi'

import { gaussian, TINY } from '../fixtures.js'

const MEGABYTE = 1e6

test('thousands of matrices leave no memory behind', (t) => {
  const options = { outFeatures: 512, inFeatures: 512, groupSize: 64 }
  const weights = gaussian(512 * 512, 1)
  const x = gaussian(512, 2)
  const cycle = (): void => {
    const layer = QuantizedLinear.quantize(weights, options)
    layer.forward(x)
    layer.dispose()
  }
  for (let i = 0; i < 100; i++) cycle()
  const before = process.memoryUsage.rss()
  for (let i = 0; i < 4000; i++) cycle()
  // Kept, they would be 4000 × 0.13 MB of codes. The allocator itself keeps up to 64 MB for each of a few threads.
  const growth = process.memoryUsage.rss() - before
  t.true(growth < 250 * MEGABYTE, `${growth} bytes`)
})

test('loading and disposing leaves no memory behind', async (t) => {
  const cycle = async (): Promise<void> => {
    using model = await loadModel(TINY)
    await model.generate('Once', { maxTokens: 4 }).text()
  }
  // The C library keeps what threads have freed, up to a limit that this reaches.
  for (let i = 0; i < 400; i++) await cycle()
  const before = process.memoryUsage.rss()
  for (let i = 0; i < 160; i++) await cycle()
  // Kept, they would be 160 × 2.6 MB.
  const growth = process.memoryUsage.rss() - before
  t.true(growth < 200 * MEGABYTE, `${growth} bytes`)
})
