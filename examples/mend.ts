// `npm run demo`: breaks a language model to 2 bits and mends it.
// --quick measures on less text, to see that everything works.
import { readdirSync, readFileSync, rmSync, statSync } from 'node:fs'
import { join, relative } from 'node:path'
import { fileURLToPath } from 'node:url'

import { Checkpoint, compress, type CompressOptions, type Job, loadModel } from 'kintsugi'

import { formatBytes, formatCount, formatSeconds } from '../src/cli/format.js'
import { showProgress } from '../src/cli/progress.js'
import { formatTable } from '../src/cli/table.js'
import { colorsFor, visibleWidth } from '../src/cli/terminal.js'

interface Variant {
  name: string
  /** Folder under `.demo/`. */
  folder: string
  options: Pick<CompressOptions, 'method' | 'eora'>
}

interface Measured {
  name: string
  folder: string
  bitsPerWeight: number
  bytes: number
  perplexity: number
  tokensPerSecond: number
}

const QUICK = process.argv.includes('--quick')
const ROOT = fileURLToPath(new URL('..', import.meta.url))
const SOURCE = join(ROOT, 'assets/llama-7m')
const CALIBRATION = join(ROOT, 'assets/text/calibration-wikipedia.txt')
const EVALUATION = join(ROOT, 'assets/text/eval-wikitext.txt')
const OUT = join(ROOT, '.demo')

const BITS = 2
const GROUP_SIZE = 64
/** Tokens of a calibration sequence and of an evaluation window. */
const LENGTH = 256
const SEQUENCES = QUICK ? 4 : 64
/** Of the evaluation text: half of it. */
const CHARACTERS = QUICK ? 20_000 : 150_000
const BAR_WIDTH = 10
const TEXT_WIDTH = 76
const SPEED_TOKENS = QUICK ? 16 : 96
const PROMPT = 'Once upon a time, there was a little girl who'
const PROMPT_OPTIONS = { maxTokens: 60, temperature: 0.7, topP: 0.9, seed: 7 }

const VARIANTS: Variant[] = [
  { name: 'RTN', folder: 'rtn', options: { method: 'rtn' } },
  { name: 'GPTQ', folder: 'gptq', options: { method: 'gptq' } },
  { name: 'GPTQ + EoRA 8', folder: 'gptq-eora-8', options: { method: 'gptq', eora: { rank: 8 } } },
  { name: 'GPTQ + EoRA 32', folder: 'gptq-eora-32', options: { method: 'gptq', eora: { rank: 32 } } },
]

const out = colorsFor(process.stdout)
const err = colorsFor(process.stderr)
const interruption = new AbortController()
process.once('SIGINT', () => interruption.abort())
const { signal } = interruption

const started = performance.now()
try {
  await demo()
} catch (error) {
  if (!signal.aborted) throw error
  process.stderr.write('\ninterrupted\n')
  process.exitCode = 1
}

async function demo(): Promise<void> {
  const original = await Checkpoint.open(SOURCE)
  const { parameters, spec, bitsPerWeight } = original.info
  print(
    '',
    `  ${out.bold(out.yellow('kintsugi'))}  a language model, broken to ${BITS} bits and mended`,
    out.dim(`  ${shown(SOURCE)}: ${formatCount(parameters!)} parameters in ${spec!.layers} blocks`),
    out.dim(`  calibrated on ${shown(CALIBRATION)}`),
    out.dim(`  measured on the first ${formatCount(CHARACTERS)} characters of ${shown(EVALUATION)}`),
    '',
  )
  const text = readFileSync(EVALUATION, 'utf8').slice(0, CHARACTERS)

  const rows = [await measure('original', SOURCE, bitsPerWeight!, text)]
  rmSync(OUT, { recursive: true, force: true })
  for (const { name, folder, options } of VARIANTS) {
    const target = join(OUT, folder)
    const report = await step(
      name,
      compress(original, {
        ...options,
        out: target,
        bits: BITS,
        groupSize: GROUP_SIZE,
        format: 'compressed-tensors/pack-quantized',
        calibration: { text: CALIBRATION, sequences: SEQUENCES, length: LENGTH },
        signal,
      }),
    )
    rows.push(await measure(name, target, report.summary.bitsPerWeight, text))
  }

  print('', indent(table(rows)), '')
  print(indent(wrap(verdict(rows))), '')
  const mended = rows.at(-1)!
  for (const { name, folder } of [rows[0]!, mended]) {
    print(`  ${out.bold(name)}`, indent(wrap(await sample(folder))), '')
  }
  print(
    indent(
      wrap(
        'What the factors cost: r·(m+k)·16/(m·k) bits per weight for an m × k matrix. At width 256 that is much: ' +
          `${factorBits(32, 256, 256)} bits at rank 32. At width 4096, where the models are that need compressing, rank 128 ` +
          `costs ${factorBits(128, 4096, 4096)} bit.`,
      ),
    ),
    '',
    `  ${out.bold('The mended model')} is ${out.yellow(shown(mended.folder))}:`,
    '  a Hugging Face folder in compressed-tensors form, with the compensation as',
    '  PEFT adapter in eora/ and the error of every Linear in report.json. Ask it:',
    out.dim(`  node dist/cli/main.js generate ${shown(mended.folder)} --prompt "Once upon a time"`),
    '',
    out.dim(`  ${formatSeconds((performance.now() - started) / 1000)} in all`),
    '',
  )
}

/** Loads the checkpoint in `folder` and measures how well it predicts, and how fast it writes. */
async function measure(name: string, folder: string, bitsPerWeight: number, text: string): Promise<Measured> {
  using model = await step(name, loadModel(folder, { signal }))
  const { perplexity, secondsTotal } = await step(name, model.perplexity(text, { length: LENGTH, signal }))
  const generation = model.generate(PROMPT, { maxTokens: SPEED_TOKENS, ignoreEos: true, signal })
  await generation.text()
  const { tokens, secondsDecode } = generation.summary!
  process.stderr.write(
    `  ${err.green('✓')} ${name.padEnd(16)} ${err.dim(`perplexity ${perplexity.toFixed(2)}, measured in ${formatSeconds(secondsTotal)}`)}\n`,
  )
  return {
    name,
    folder,
    bitsPerWeight,
    bytes: folderBytes(folder),
    perplexity,
    tokensPerSecond: tokens / secondsDecode,
  }
}

function step<T>(name: string, job: Job<T>): Promise<T> {
  return showProgress(job, `  ${err.yellow('◆')} ${name.padEnd(16)}`, process.stderr)
}

function table(rows: readonly Measured[]): string {
  const damage = ({ perplexity }: Measured): number => Math.max(0, perplexity - rows[0]!.perplexity)
  const worst = Math.max(...rows.map(damage))
  return formatTable(
    [
      { title: 'variant' },
      { title: 'bits/weight', align: 'right' },
      { title: 'size', align: 'right' },
      { title: 'perplexity', align: 'right' },
      { title: 'tokens/s', align: 'right' },
      { title: 'damage' },
    ],
    rows.map((row, index) => [
      index === rows.length - 1 ? out.bold(row.name) : row.name,
      row.bitsPerWeight.toFixed(2),
      formatBytes(row.bytes),
      row.perplexity.toFixed(2),
      row.tokensPerSecond.toFixed(0),
      index === 0 ? '' : `${out.yellow(bar(damage(row) / worst))} +${damage(row).toFixed(2)}`,
    ]),
    process.stdout,
  )
}

/** A bar in steps of an eighth of a character. */
function bar(share: number): string {
  const eighths = Math.max(1, Math.round(share * BAR_WIDTH * 8))
  return '█'.repeat(Math.floor(eighths / 8)) + ['', '▏', '▎', '▍', '▌', '▋', '▊', '▉'][eighths % 8]!
}

function verdict(rows: readonly Measured[]): string {
  const [original, rtn, gptq] = rows.map(({ perplexity }) => perplexity) as [number, number, number]
  const mended = rows.at(-1)!.perplexity
  const share = (before: number): string => `${(((before - mended) / (before - original)) * 100).toFixed(0)} %`
  return `EoRA 32 undoes ${share(gptq)} of the damage that GPTQ left, and GPTQ with it ${share(rtn)} of that of plain rounding.`
}

async function sample(folder: string): Promise<string> {
  using model = await loadModel(folder, { signal })
  const text = await model.generate(PROMPT, { ...PROMPT_OPTIONS, signal }).text()
  return `${out.dim(PROMPT)}${text.replace(/\s+/g, ' ').trimEnd()}`
}

function factorBits(rank: number, rows: number, columns: number): string {
  return ((rank * (rows + columns) * 16) / (rows * columns)).toFixed(1)
}

function folderBytes(folder: string): number {
  const entries = readdirSync(folder, { withFileTypes: true, recursive: true })
  return entries
    .filter((entry) => entry.isFile())
    .reduce((sum, { parentPath, name }) => sum + statSync(join(parentPath, name)).size, 0)
}

function shown(path: string): string {
  return relative(process.cwd(), path) || '.'
}

function indent(text: string): string {
  return text.replace(/^/gm, '  ')
}

/** Breaks prose into lines. */
function wrap(text: string): string {
  const lines = ['']
  for (const word of text.split(' ')) {
    if (visibleWidth(`${lines.at(-1)} ${word}`) > TEXT_WIDTH) lines.push(word)
    else lines.push(`${lines.pop()} ${word}`.trimStart())
  }
  return lines.join('\n')
}

function print(...lines: string[]): void {
  process.stdout.write(`${lines.join('\n')}\n`)
}
