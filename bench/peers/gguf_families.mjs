// Writes the tiny random models of __test__/vectors/families as GGUF (F32), runs them in llama.cpp (node-llama-cpp) and
// compares the probabilities of every position with those of transformers, which lie beside the models. llama.cpp keeps
// keys and values in half precision, hence differences of about a thousandth.
//
//     PEERS=PEERS node bench/peers/gguf_families.mjs        (see gguf_llama_cpp.mjs)
//
// Exits with 1 when a difference is larger than 0.01.
import { cpSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath, pathToFileURL } from 'node:url'

import { convert } from '../../dist/index.js'

// Left out: what llama.cpp has not (windows of these sizes, dynamic scaling, biases of Qwen 3, unscaled scores), and
// models whose long factors it chooses by the size of the context.
const FAMILIES = [
  ...['llama', 'llama-biased', 'llama-linear', 'llama-llama3', 'llama-yarn', 'llama-longrope', 'qwen2', 'qwen2-tied'],
  ...['qwen2-moe', 'qwen3-moe', 'gpt2', 'gpt-neox', 'gpt-neox-sequential'],
]

const root = fileURLToPath(new URL('../..', import.meta.url))
const peers = createRequire(join(process.env.PEERS ?? root, 'package.json'))
const { getLlama } = await import(pathToFileURL(peers.resolve('node-llama-cpp')).href)
const llama = await getLlama({ gpu: false, logLevel: 'error', build: 'never' })

const scratch = mkdtempSync(join(tmpdir(), 'kintsugi-families-'))
let failed = false
console.log('| family | largest difference of a probability |\n|---|---|')
try {
  for (const name of FAMILIES) {
    const folder = join(scratch, name)
    cpSync(join(root, '__test__/vectors/families', name), folder, { recursive: true })
    const { tokens, logits } = JSON.parse(readFileSync(join(folder, 'logits.json'), 'utf8'))
    // The vectors have a tokenizer of whole words, which GGUF has no kind for; it plays no part here.
    const step = { type: 'ByteLevel', add_prefix_space: false, trim_offsets: true, use_regex: true }
    const vocab = Object.fromEntries(logits[0].map((_, id) => [String.fromCharCode(33 + id), id]))
    const tokenizer = { version: '1.0', added_tokens: [], pre_tokenizer: step, decoder: step }
    writeFileSync(join(folder, 'tokenizer.json'), JSON.stringify({ ...tokenizer, model: { type: 'BPE', vocab, merges: [] } }))
    const path = `${folder}.gguf`
    await convert(folder, { out: path, format: 'gguf:F32' })
    const model = await llama.loadModel({ modelPath: path })
    const context = await model.createContext({ contextSize: 64, threads: 1 })
    const options = { temperature: 1, topK: 0, topP: 1, minP: 0 }
    const rows = await context
      .getSequence()
      .controlledEvaluate(tokens.map((token) => [token, { generateNext: { probabilities: true, options } }]))
    let worst = 0
    rows.forEach((row, position) => {
      const largest = Math.max(...logits[position])
      const weights = logits[position].map((logit) => Math.exp(logit - largest))
      const total = weights.reduce((sum, weight) => sum + weight)
      for (const [token, probability] of row.next.probabilities) {
        worst = Math.max(worst, Math.abs(probability - weights[token] / total))
      }
    })
    failed ||= !(worst < 0.01)
    console.log(`| ${name} | ${worst.toExponential(1)} |`)
    await context.dispose()
    await model.dispose()
  }
} finally {
  rmSync(scratch, { recursive: true })
}
process.exit(failed ? 1 : 0)
