// Merges two adapters in several ways and shows what is left of each: distance from the sum, and perplexity.
// usage: merge.ts [CHECKPOINT] [TEXT] [ADAPTER ADAPTER ...]
import { mkdtemp, readFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

import { loadModel, merge } from 'kintsugi'

const [checkpoint = 'assets/llama-7m', textFile = 'assets/text/eval-shakespeare.txt', ...given] = process.argv.slice(2)
const sources = given.length > 0 ? given : ['assets/adapters/shakespeare', 'assets/adapters/python']
const folder = await mkdtemp(join(tmpdir(), 'kintsugi-'))
const weights = sources.map(() => 1 / sources.length)

const adapters: Record<string, string> = {}
for (const method of ['cat', 'svd', 'lego', 'lego-gauge-free', 'ties', 'tsv'] as const) {
  const out = (adapters[method] = join(folder, method))
  const { summary } = await merge(sources, { out, method, weights })
  const shares = summary.adapters.map(({ retained }) => `${((retained ?? 0) * 100).toFixed(0)} %`)
  console.log(`${method}: rank ${summary.rank}, ${((summary.error ?? 0) * 100).toFixed(1)} % from the sum, retained ${shares.join(', ')}`)
}

using model = await loadModel(checkpoint, { adapters })
const text = (await readFile(textFile, 'utf8')).slice(0, 6000)
console.log(`without adapter: perplexity ${(await model.perplexity(text, { length: 256 })).perplexity.toFixed(2)}`)
for (const adapter of Object.keys(adapters)) {
  const { perplexity } = await model.perplexity(text, { length: 256, adapter })
  console.log(`${adapter}: perplexity ${perplexity.toFixed(2)}`)
}
