import { existsSync, readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'

import test from 'ava'
import { Checkpoint, loadModel } from 'kintsugi'

import { asset, LLAMA, SHAKESPEARE, STORIES, temporaryFolder, textSlice, TINY } from '../fixtures.js'
import { kintsugi, start } from './command-line.js'

const PYTHON = asset('adapters/python')
const CALIBRATION = ['--calibration', STORIES, '--sequences', '4', '--length', '64']

test('inspect', async (t) => {
  const json = await kintsugi('inspect', TINY, '--json')
  t.is(json.code, 0)
  t.is(json.stderr, '')
  t.deepEqual(JSON.parse(json.stdout), { ...(await Checkpoint.open(TINY)).info })
  const { code, stdout } = await kintsugi('inspect', TINY)
  t.is(code, 0)
  t.regex(stdout, /architecture +LlamaForCausalLM/)
  t.regex(stdout, /bits per weight +32\.00/)
})

test('inspect of nothing', async (t) => {
  const { code, stdout, stderr } = await kintsugi('inspect', '/no/such/folder')
  t.is(code, 1)
  t.is(stdout, '')
  t.regex(stderr, /\[ERR_CHECKPOINT_NOT_FOUND\]\n {2}about: \/no\/such\/folder/)
})

test('compress, inspect, eval and generate work on each other', async (t) => {
  const folder = temporaryFolder(t)
  const out = join(folder, 'w4')
  const compressing = ['compress', TINY, '-o', out, '--group-size', '64', '--eora-rank', '8', ...CALIBRATION]

  const plan = await kintsugi(...compressing, '--dry-run', '--json')
  t.is(plan.code, 0)
  t.deepEqual(readdirSync(folder), [])

  const readable = await kintsugi(...compressing, '--dry-run', '--memory', '2G', '--activations', 'disk')
  t.regex(readable.stdout, /working memory +about [\d.]+ MB of 2\.\d+ GB, activations on disk/)
  t.regex(readable.stdout, /disk space +about/)

  const compressed = await kintsugi(...compressing, '--json')
  t.is(compressed.code, 0, compressed.stderr)
  const report = JSON.parse(compressed.stdout)
  t.deepEqual(Object.keys(report), ['recipe', 'summary', 'linears'])
  t.is(report.summary.bitsPerWeight, JSON.parse(plan.stdout).bitsPerWeight)
  t.deepEqual(report, JSON.parse(readFileSync(join(out, 'report.json'), 'utf8')))

  const inspected = await kintsugi('inspect', out)
  t.regex(inspected.stdout, /4 bits, groups of 64, asymmetric/)
  t.regex(inspected.stdout, /rank 8 on 14 Linears/)

  const text = join(folder, 'text.txt')
  writeFileSync(text, textSlice(STORIES, 10_000))
  const evaluated = await kintsugi('eval', out, '--text', text, '--length', '64', '--reference', TINY, '--json')
  t.is(evaluated.code, 0, evaluated.stderr)
  const measured = JSON.parse(evaluated.stdout)
  for (const name of [
    'perplexity',
    'meanNegativeLogLikelihood',
    'tokens',
    'windows',
    'secondsTotal',
    'bitsPerWeight',
  ]) {
    t.is(typeof measured[name], 'number', name)
  }
  t.is(measured.reference.checkpoint, TINY)
  t.true(measured.divergence.meanKlDivergence > 0)
  t.true(measured.divergence.p99KlDivergence > measured.divergence.meanKlDivergence)
  t.true(measured.divergence.top1Agreement > 0.5 && measured.divergence.top1Agreement < 1)
  t.is(measured.tokens, measured.windows * 63)
  t.true(measured.perplexity > 0.98 * measured.reference.perplexity)

  const again = await kintsugi(...compressing)
  t.is(again.code, 1)
  t.regex(again.stderr, /ERR_OUTPUT_NOT_EMPTY/)
})

test('the reports for readers', async (t) => {
  const out = join(temporaryFolder(t), 'w2')
  const args = ['compress', TINY, '-o', out, '--bits', '2', '--group-size', '64', ...CALIBRATION]
  const plan = await kintsugi(...args, '--dry-run')
  t.regex(plan.stdout, /nothing was written/)
  t.regex(plan.stdout, /down_proj 128 × 384 +2 +0 +2\.\d\d/)
  const compressed = await kintsugi(...args)
  t.is(compressed.code, 0, compressed.stderr)
  t.regex(compressed.stdout, /bits per weight +2\.\d\d/)
  t.regex(compressed.stdout, /largest output errors/)
  const evaluated = await kintsugi('eval', TINY, '--text', STORIES, '--length', '256')
  t.regex(evaluated.stdout, /^perplexity +34\.\d{4}$/m)
})

test('generate streams the text alone to stdout', async (t) => {
  const args = ['generate', TINY, '--prompt', 'Once upon a time', '--max-tokens', '16', '--precision', 'f32']
  const plain = await kintsugi(...args)
  t.is(plain.code, 0, plain.stderr)
  t.is(plain.stderr, '')
  using model = await loadModel(TINY, { precision: 'f32' })
  const text = await model.generate('Once upon a time', { maxTokens: 16 }).text()
  t.is(plain.stdout, `${text}\n`)

  const document = JSON.parse((await kintsugi(...args, '--json')).stdout)
  t.like(document, { prompt: 'Once upon a time', text, tokens: 16, finishReason: 'length' })
  t.is(document.tokenIds.length, 16)
})

test('generate with sampling, stop strings and an adapter', async (t) => {
  const sampling = ['--temperature', '0.9', '--top-k', '50', '--top-p', '0.95', '--min-p', '0.01', '--seed', '7']
  const args = ['generate', LLAMA, '--prompt', 'ROMEO:', '--max-tokens', '24', '--adapter', SHAKESPEARE, ...sampling]
  const [first, second] = [await kintsugi(...args), await kintsugi(...args)]
  t.is(first.code, 0, first.stderr)
  t.is(first.stdout, second.stdout)
  const stop = first.stdout.slice(4, 7)
  const stopped = await kintsugi(...args, '--stop', 'never appears', '--stop', stop)
  t.is(stopped.stdout, `${first.stdout.slice(0, first.stdout.indexOf(stop))}\n`)
})

test('compensate, and what it has written in eval and generate', async (t) => {
  const folder = temporaryFolder(t)
  const [compressed, out] = [join(folder, 'w2'), join(folder, 'eora')]
  const first = await kintsugi('compress', TINY, '-o', compressed, '--method', 'rtn', '--bits', '2', '--group-size', '32')
  t.is(first.code, 0, first.stderr)
  const compensating = ['compensate', TINY, compressed, '-o', out, ...CALIBRATION]
  const bare = await kintsugi('compensate', TINY, compressed, '-o', out, '--rank', '8')
  t.is(bare.code, 2)
  t.regex(bare.stderr, /about: --calibration/)

  const plan = await kintsugi(...compensating, '--mean-rank', '8', '--dry-run')
  t.is(plan.code, 0, plan.stderr)
  t.regex(plan.stdout, /factors +at most/)
  t.false(existsSync(out))
  const affine = await kintsugi(...compensating, '--rank', '8', '--affine', '--dry-run', '--json')
  t.is(affine.code, 0, affine.stderr)
  t.like(JSON.parse(affine.stdout).recipe.eora, { rank: 8, affine: true })
  const grouped = await kintsugi(...compensating, '--rank', '8', '--grouped', '--dry-run', '--json')
  t.is(grouped.code, 0, grouped.stderr)
  t.like(JSON.parse(grouped.stdout).recipe.eora, { rank: 8, grouped: true })

  const done = await kintsugi(...compensating, '--rank', '16', '--factor-bits', '8', '--json')
  t.is(done.code, 0, done.stderr)
  const report = JSON.parse(done.stdout)
  t.deepEqual(report, JSON.parse(readFileSync(join(out, 'report.json'), 'utf8')))
  t.like(report.recipe.eora, { rank: 16, solver: 'fast', factorBits: 8 })

  const mixed = [...compensating, '--rank', '8', '--inputs', 'mixed', '--mismatch', '0.7']
  const both = await kintsugi(...mixed.map((given) => (given === out ? join(folder, 'mixed') : given)))
  t.is(both.code, 0, both.stderr)
  t.regex(both.stdout, /against the original +[\d.]+ % → [\d.]+ % with factors/)

  const weighted = [...compensating, '--mean-rank', '8', '--rank-weights', 'ablation']
  const divided = await kintsugi(...weighted.map((given) => (given === out ? join(folder, 'divided') : given)))
  t.is(divided.code, 0, divided.stderr)
  t.regex(divided.stdout, /weights of ranks +fitted to ablations on \d+ (held out )?tokens/)

  const text = join(folder, 'text.txt')
  writeFileSync(text, textSlice(STORIES, 10_000))
  const perplexity = async (...options: string[]): Promise<number> => {
    const { code, stdout, stderr } = await kintsugi('eval', compressed, '--text', text, '--length', '64', '--json', ...options)
    t.is(code, 0, stderr)
    return JSON.parse(stdout).perplexity
  }
  const [none, part, all] = [
    await perplexity('--no-compensation'),
    await perplexity('--compensation', out, '--eora-rank', '4'),
    await perplexity('--compensation', out),
  ]
  t.true(all < part && part < none, `${all} ${part} ${none}`)
  const generated = await kintsugi('generate', compressed, '--prompt', 'Once', '--max-tokens', '4', '--compensation', out)
  t.is(generated.code, 0, generated.stderr)
})

test('merge and fold', async (t) => {
  const folder = temporaryFolder(t)
  const [out, folded] = [join(folder, 'both'), join(folder, 'folded')]
  const merging = ['merge', SHAKESPEARE, PYTHON, '-o', out, '--method', 'svd', '--rank', '8', '--weights', '1,0.5']
  const plan = await kintsugi(...merging, '--dry-run')
  t.is(plan.code, 0, plan.stderr)
  t.regex(plan.stdout, /modules +56\n/)
  t.deepEqual(readdirSync(folder), [])
  const json = await kintsugi(...merging, '--json')
  t.is(json.code, 0, json.stderr)
  t.deepEqual(JSON.parse(json.stdout), JSON.parse(readFileSync(join(out, 'report.json'), 'utf8')))
  const again = await kintsugi(...merging)
  t.is(again.code, 1)
  t.regex(again.stderr, /ERR_OUTPUT_NOT_EMPTY/)
  const text = await kintsugi('merge', SHAKESPEARE, PYTHON, '-o', join(folder, 'lego'), '--no-output-reweighting')
  t.is(text.code, 0, text.stderr)
  t.regex(text.stdout, /distance from the sum +\d+\.\d %/)
  t.regex(text.stdout, /farthest from the sum/)
  const wrong = await kintsugi('merge', SHAKESPEARE, '-o', join(folder, 'x'), '--weights', '1,a')
  t.is(wrong.code, 2)
  const fewer = await kintsugi('remerge', out, '--remove', 'python', '-o', join(folder, 'fewer'), '--json')
  t.is(fewer.code, 0, fewer.stderr)
  const more = await kintsugi('remerge', join(folder, 'fewer'), '--add', `${PYTHON}=0.5`, '-o', join(folder, 'more'))
  t.is(more.code, 0, more.stderr)
  t.regex(more.stdout, /python +0\.5 +56 /)
  const weights = (name: string): Buffer => readFileSync(join(folder, name, 'adapter_model.safetensors'))
  t.deepEqual(weights('more'), weights('both'))
  const none = await kintsugi('remerge', out, '--add', `${PYTHON}=much`, '-o', join(folder, 'x'))
  t.is(none.code, 2)
  const fold = await kintsugi('fold', LLAMA, out, '-o', folded, '--element-type', 'bf16')
  t.is(fold.code, 0, fold.stderr)
  t.regex(fold.stdout, /weights changed +56/)
})

test('doctor', async (t) => {
  const json = await kintsugi('doctor', '--json')
  t.is(json.code, 0, json.stderr)
  const report = JSON.parse(json.stdout)
  const { code, stdout } = await kintsugi('doctor')
  t.is(code, 0)
  t.regex(stdout, new RegExp(`self-check +${report.selfCheck.length} of ${report.selfCheck.length} cases`))
})

test('bench', async (t) => {
  t.is((await kintsugi('bench', '--rows', 'many')).code, 2)
  const short = ['--rows', '1', '--seconds', '0.001', '--threads', '2']
  const json = await kintsugi('bench', ...short, '--json')
  const report = JSON.parse(json.stdout)
  // Matrices beyond a cache of gigabytes do not fit into the memory of every machine that has one.
  if (report.error?.code === 'ERR_MEMORY_EXCEEDED') {
    t.is(json.code, 1)
    t.log(`left out: ${report.error.message}`)
    return
  }
  t.is(json.code, 0, json.stderr)
  t.is(report.products.length, 10)
  const { code, stdout } = await kintsugi('bench', ...short)
  t.is(code, 0)
  t.regex(stdout, new RegExp(`level ${report.cpuLevel}, 2 threads`))
  // A single round has no range.
  t.regex(stdout, /^memory +2 +[\d.]+ GB\/s +– +1 /m)
  t.regex(stdout, /^int4 g128 fast r=64 +1 +[\d.]+ +– +1 .* % (memory|int8)$/m)
  t.regex(stdout, /^tokens\/s at most +1B +7B +8B$/m)
})

test('an interruption cancels and fails', async (t) => {
  const folder = temporaryFolder(t)
  const out = join(folder, 'out')
  const calibration = ['--calibration', STORIES, '--sequences', '128', '--length', '512']
  const { child, ended } = start(['compress', LLAMA, '-o', out, ...calibration, '--json'])
  while (child.exitCode === null && !existsSync(`${out}.partial`))
    await new Promise((resolve) => setTimeout(resolve, 20))
  child.kill('SIGINT')
  const { code, stdout, stderr } = await ended
  t.is(code, 1)
  t.is(JSON.parse(stdout).error.code, 'ERR_CANCELLED')
  t.regex(stderr, /interrupted/)
  t.false(existsSync(out))
})

test('a reader that leaves early is no failure', async (t) => {
  const { child, ended } = start(['generate', TINY, '--prompt', 'Once', '--max-tokens', '300', '--ignore-eos'])
  child.stdout!.once('data', () => child.stdout!.destroy())
  const { code, stderr } = await ended
  t.is(code, 0)
  t.is(stderr, '')
})
