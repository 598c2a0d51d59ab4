import { readFile } from 'node:fs/promises'

import { type Command, InvalidArgumentError } from 'commander'

import { type CalibrationOptions, type EoraOptions, KintsugiError, type LinearOverride } from '../index.js'

/** Parses the value of an option that is a number. */
export function numberArgument(value: string): number {
  const number = Number(value)
  if (value.trim() === '' || Number.isNaN(number)) throw new InvalidArgumentError('It is not a number.')
  return number
}

/** Parses the value of an option that is a list of numbers. */
export function numbersArgument(value: string): number[] {
  return value.split(',').map(numberArgument)
}

/** Parses `--group-size`. */
export function groupSizeArgument(value: string): number | 'whole' {
  return value === 'whole' ? value : numberArgument(value)
}

/** Parses a number of bytes: plain, or with a unit of 1024 (`K`, `M`, `G`, `T`, with or without `iB`). */
export function bytesArgument(value: string): number {
  const match = /^(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?$/i.exec(value.trim())
  if (!match) throw new InvalidArgumentError("It is not a number of bytes, such as 6G or '512 MiB'.")
  return Math.floor(Number(match[1]) * 1024 ** ['', 'K', 'M', 'G', 'T'].indexOf(match[2]!.toUpperCase()))
}

/** Parses `--override PATTERN=BITS[:GROUP]`, which may be given several times. */
export function overrideArgument(value: string, previous: LinearOverride[] | undefined): LinearOverride[] {
  const match = /^(?<linears>.+)=(?<bits>\d+)?(?::(?<group>\w+))?$/.exec(value)
  const { linears, bits, group } = match?.groups ?? {}
  if (linears === undefined || (bits === undefined && group === undefined)) {
    throw new InvalidArgumentError("Give LINEARS=BITS, LINEARS=BITS:GROUP or LINEARS=:GROUP, e.g. '*.down_proj=8:64'.")
  }
  const override: LinearOverride = { linears }
  // The library names what is wrong with the numbers.
  if (bits !== undefined) override.bits = Number(bits) as NonNullable<LinearOverride['bits']>
  if (group !== undefined) override.groupSize = groupSizeArgument(group)
  return [...(previous ?? []), override]
}

/** Parses an option that may be given several times. */
export function listArgument(value: string, previous: string[] | undefined): string[] {
  return [...(previous ?? []), value]
}

/** Adds the options of a compensation, each with `prefix` before its name; the library checks their values. */
export function withEoraOptions(command: Command, prefix = ''): Command {
  return command
    .option(`--${prefix}rank <n>`, 'compensate with factors of this rank; with a budget the largest', numberArgument)
    .option(`--${prefix}solver <name>`, 'fast, exact, diagonal or lorc (default: fast)')
    .option(`--${prefix}factor-bits <n>`, 'bits of a value of the factors: 16, 8 or 4 (default: 16)', numberArgument)
    .option(`--${prefix}inputs <name>`, 'solve for deployed, dense or mixed inputs (default: deployed)')
    .option(`--${prefix}mismatch <n>`, 'mixed inputs: how much of their difference to correct (default: 0.5)', numberArgument)
    .option(`--${prefix}affine`, 'with a bias for the mean of the inputs')
    .option(`--${prefix}grouped`, 'one A for query, key and value, and for gate and up')
    .option(`--${prefix}mean-rank <n>`, 'divide the bytes of this rank where they do most good', numberArgument)
    .option(`--${prefix}budget <size>`, 'the same with so many bytes, such as 200M', bytesArgument)
    .option(`--${prefix}min-rank <n>`, 'with a budget: least rank of a Linear (default: 0)', numberArgument)
    .option(`--${prefix}rank-multiple <n>`, 'with a budget: what ranks are multiples of (default: 8)', numberArgument)
    .option(`--${prefix}rank-weights <name>`, 'with a budget: outputs, equal or ablation (default: outputs)')
}

/** The compensation that options of {@link withEoraOptions} ask for; `undefined` without any. */
export function eoraArguments(given: EoraArguments): EoraOptions | undefined {
  const { budget, rank, solver, factorBits, inputs, mismatch, affine, grouped } = given
  const { meanRank, minRank, rankMultiple, rankWeights } = given
  const division = { meanRank, budgetBytes: budget, minRank, rankMultiple, rankWeights }
  const options = withoutUndefined({ rank, solver, factorBits, inputs, mismatch, affine, grouped, ...division })
  return Object.keys(options).length > 0 ? options : undefined
}

/** Values of {@link withEoraOptions} without a prefix; the library checks them. */
export interface EoraArguments {
  rank?: number | undefined
  solver?: EoraOptions['solver'] | undefined
  factorBits?: EoraOptions['factorBits'] | undefined
  inputs?: EoraOptions['inputs'] | undefined
  mismatch?: number | undefined
  affine?: boolean | undefined
  grouped?: boolean | undefined
  meanRank?: number | undefined
  budget?: number | undefined
  minRank?: number | undefined
  rankMultiple?: number | undefined
  rankWeights?: EoraOptions['rankWeights'] | undefined
}

/** Adds the options of a calibration; what it is for stands in `purpose`. */
export function withCalibrationOptions(command: Command, purpose = ''): Command {
  return command
    .option(
      '--calibration <file[=weight]>',
      'what the statistics are taken from: a text, .jsonl records, token ids, or saved statistics; may be repeated' +
        ` for a mixture, in which each token of a file counts as often as its weight says (default: 1)${purpose}`,
      calibrationArgument,
    )
    .option('--field <name>', 'JSONL: field with the text', 'text')
    .option('--sequences <n>', 'most calibration sequences of a file', numberArgument, 128)
    .option('--length <n>', 'tokens of a calibration sequence', numberArgument, 2048)
    .option('--seed <n>', 'choose the sequences by chance instead of from the beginning', numberArgument)
    .option('--hold-out <n>', 'sequences of a file that errors of a compensation are measured on', numberArgument)
    .option('--activations <place>', 'where calibration activations are kept: auto, memory or disk', 'auto')
    .option('--subset', 'take the statistics of each group of Linears after those before it are done', false)
}

/** The calibration that options of {@link withCalibrationOptions} ask for; `undefined` without a file. */
export function calibrationArguments(given: CalibrationArguments): CalibrationOptions | undefined {
  const { calibration: sources, field, sequences, length, seed, holdOut, activations, subset } = given
  if (sources === undefined) return undefined
  return withoutUndefined({ sources, field, sequences, length, seed, holdOut, activations, subset })
}

/**
 * Parses `--calibration FILE[=WEIGHT]`; what stands behind the last `=` is a weight if it is a number. A file whose name
 * ends in `=2` is given as `FILE=2=1`.
 */
export function calibrationArgument(value: string, previous?: CalibrationFile[]): CalibrationFile[] {
  const { file, weight } = /^(?<file>.+?)(?:=(?<weight>[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?))?$/i.exec(value)?.groups ?? {}
  const source = { file: file ?? value, ...withoutUndefined({ weight: weight && numberArgument(weight) }) }
  return [...(previous ?? []), source as CalibrationFile]
}

interface CalibrationFile {
  file: string
  weight?: number
}

/** Values of {@link withCalibrationOptions}; the library checks them. */
export interface CalibrationArguments {
  calibration?: CalibrationFile[]
  field: string
  sequences: number
  length: number
  seed?: number
  holdOut?: number
  activations: NonNullable<CalibrationOptions['activations']>
  subset: boolean
}

/** `options` without the keys that were not given. */
export function withoutUndefined<T extends object>(options: T): { [K in keyof T]: Exclude<T[K], undefined> } {
  const given = Object.entries(options).filter(([, value]) => value !== undefined)
  return Object.fromEntries(given) as { [K in keyof T]: Exclude<T[K], undefined> }
}

/** Adds the options that say how a model runs; `precisions` are those that the command takes. */
export function withModelOptions(command: Command, precisions = 'f32, exact or fast'): Command {
  return command
    .option('--precision <name>', precisions, 'exact')
    .option('--backend <name>', 'cpu, or candle for the plain reference', 'cpu')
}

/** Values of {@link withModelOptions}; the library checks them. */
export interface ModelArguments {
  precision: 'f32' | 'exact' | 'fast'
  backend: 'cpu' | 'candle'
}

/** Reads a UTF-8 text file. */
export async function readText(path: string): Promise<string> {
  let bytes: Buffer
  try {
    bytes = await readFile(path)
  } catch (error) {
    throw unreadable(
      path,
      error instanceof Error ? error.message : String(error),
      'Give the path of a UTF-8 text file.',
    )
  }
  try {
    return new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(bytes)
  } catch {
    throw unreadable(path, 'the text is not UTF-8', 'Convert the file to UTF-8.')
  }
}

function unreadable(subject: string, message: string, hint: string): KintsugiError {
  return new KintsugiError({ code: 'ERR_TEXT_UNREADABLE', message, subject, hint })
}
