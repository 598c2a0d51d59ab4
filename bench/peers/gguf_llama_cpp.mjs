// Writes a checkpoint as GGUF in several types and runs each file here and in llama.cpp (node-llama-cpp, its prebuilt
// CPU binary): greedy tokens of a prompt, and perplexity over the same windows of the same tokens. `gptq:Q4_0` is the file
// that `compress` makes with the method before the colon.
//
//     npm run build
//     npm install --prefix PEERS node-llama-cpp@3.22.1
//     PEERS=PEERS node bench/peers/gguf_llama_cpp.mjs [CHECKPOINT] [TYPES] [WINDOWS]
//
// Exits with 1 when the tokens of a file of floats differ, or perplexities are more than 1 % apart. Of codes llama.cpp
// multiplies activations that it rounds to 8 bits, so that tokens can part where two are about as likely.
import { mkdtempSync, readFileSync, rmSync, statSync } from 'node:fs'
import { createRequire } from 'node:module'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath, pathToFileURL } from 'node:url'

import { compress, convert, loadModel } from '../../dist/index.js'

const root = fileURLToPath(new URL('../..', import.meta.url))
const peers = createRequire(join(process.env.PEERS ?? root, 'package.json'))
const { getLlama } = await import(pathToFileURL(peers.resolve('node-llama-cpp')).href)

const checkpoint = process.argv[2] ?? join(root, 'assets/llama-7m')
const types = (process.argv[3] ?? 'F16,Q8_0,Q6_K,Q4_K,Q4_1,Q4_0,gptq:Q4_0,awq:Q4_0').split(',')
const windows = Number(process.argv[4] ?? 4)
const LENGTH = 256
const PROMPT = 'Once upon a time, there was a little girl named Lily.'
const TOKENS = 48

/** Tokens and perplexity by llama.cpp. Special tokens are parsed, as `tokenizer.json` has it. */
async function peer(path, text) {
  const llama = await getLlama({ gpu: false, logLevel: 'error', build: 'never' })
  const model = await llama.loadModel({ modelPath: path })
  const context = await model.createContext({ contextSize: 512, threads: 2 })
  const sequence = context.getSequence()
  const tokens = []
  const start = model.tokens.shouldPrependBosToken ? [model.tokens.bos] : []
  for await (const token of sequence.evaluate([...start, ...model.tokenize(PROMPT, true)], { temperature: 0 })) {
    tokens.push(token)
    if (tokens.length === TOKENS) break
  }
  const all = model.tokenize(text, true)
  let sum = 0
  let count = 0
  const options = { temperature: 1, topK: 0, topP: 1, minP: 0 }
  for (let from = 0; from + LENGTH <= all.length; from += LENGTH) {
    const window = all.slice(from, from + LENGTH)
    await sequence.clearHistory()
    const rows = await sequence.controlledEvaluate(
      window.map((token) => [token, { generateNext: { probabilities: true, options } }]),
    )
    for (let i = 1; i < window.length; i++) {
      sum -= Math.log(rows[i - 1].next.probabilities.get(window[i]))
      count++
    }
  }
  await context.dispose()
  await model.dispose()
  return { tokens, perplexity: Math.exp(sum / count), count }
}

/** The same here, in plain f32. */
async function ours(path, text, length) {
  const model = await loadModel(path, { precision: 'f32' })
  const tokens = []
  for await (const piece of model.generate(PROMPT, { maxTokens: TOKENS, temperature: 0 })) tokens.push(piece.token)
  const { perplexity, tokens: count } = await model.perplexity(text, { length })
  model.dispose()
  return { tokens, perplexity, count }
}

/** The checkpoint as a file of that type, converted or compressed. */
async function written(type) {
  const [name, method] = type.split(':').reverse()
  if (method === undefined) {
    const out = join(folder, `${name}.gguf`)
    await convert(checkpoint, { out, format: `gguf:${name}`, allowRequantize: true })
    return out
  }
  const out = join(folder, `${method}-${name}`)
  const calibration = { text: join(root, 'assets/text/calibration-wikipedia.txt'), sequences: 64, length: 256 }
  await compress(checkpoint, { out, method, format: `gguf:${name}`, calibration })
  return join(out, 'model.gguf')
}

// About so many windows: the tokens have four characters in the mean.
const text = readFileSync(join(root, 'assets/text/eval-stories.txt'), 'utf8').slice(0, windows * LENGTH * 4)

const folder = mkdtempSync(join(tmpdir(), 'kintsugi-gguf-'))
let failed = false
const notes = []
console.log('| type | bytes | perplexity here | in llama.cpp | difference | same greedy tokens |\n|---|---|---|---|---|---|')
try {
  for (const type of types) {
    const path = await written(type)
    const theirs = await peer(path, text)
    const here = await ours(path, text, LENGTH)
    const parting = theirs.tokens.findIndex((token, i) => token !== here.tokens[i])
    const same = parting < 0 ? TOKENS : parting
    if (parting >= 0) notes.push(`${type}, token ${parting}: ${here.tokens[parting]} here, ${theirs.tokens[parting]} there`)
    const difference = theirs.perplexity / here.perplexity - 1
    failed ||= (same !== TOKENS && /^B?F/.test(type)) || !(Math.abs(difference) < 0.01)
    const cells = [type, statSync(path).size.toLocaleString('en'), here.perplexity.toFixed(4)]
    cells.push(theirs.perplexity.toFixed(4), `${(100 * difference).toFixed(3)} %`, `${same} of ${TOKENS}`)
    console.log(`| ${cells.join(' | ')} |`)
    if (here.count !== theirs.count) throw new Error(`${here.count} tokens here, ${theirs.count} there`)
  }
} finally {
  rmSync(folder, { recursive: true })
}
if (notes.length > 0) console.log(`\n${notes.join('\n')}`)
process.exit(failed ? 1 : 0)
