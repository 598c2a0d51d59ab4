import { KintsugiError } from './errors.js'
import type { BindingCalibration } from './native.js'
import {
  boolean,
  type Checked,
  integer,
  listOf,
  number,
  object,
  oneOf,
  optional,
  text,
  withDefault,
  withoutUndefined,
} from './options.js'

/** One file that calibration statistics are taken from, or that holds them: `text` or `file`. */
export interface CalibrationSourceOptions {
  /** Path of a UTF-8 text file, whatever its name. */
  text?: string
  /**
   * Path of a file whose ending says what it holds: `.jsonl` records with a text or arrays of token ids, `.json` arrays
   * of token ids, `.safetensors` token ids (`input_ids`) or statistics that an earlier job saved, else UTF-8 text.
   */
  file?: string
  /** JSONL: field of a record with the text, default `text`. */
  field?: string
  /** Most sequences that are taken, default 128. */
  sequences?: number
  /** Chooses the sequences by chance, the same for the same seed; by default those at the beginning are taken. */
  seed?: number
  /**
   * Compensation: sequences behind those that take no part in the statistics; errors are measured on them, too. By default
   * an eighth of `sequences`, while that is no more than 2048 tokens of all texts, and at least two of each of several;
   * fewer where the file is short.
   */
  holdOut?: number
}

/** Where calibration statistics come from: one file, or a mixture of several `sources`. */
export interface CalibrationOptions extends CalibrationSourceOptions {
  /**
   * In place of `text` and `file`: several of them. Each token of a source counts `weight` times, default 1: second
   * moments are summed with these weights. What a source does not say itself (`field`, `sequences`, `seed`, `holdOut`) is
   * taken from beside `sources`.
   */
  sources?: (CalibrationSourceOptions & { weight?: number })[]
  /** Tokens of a sequence, default 2048. */
  length?: number
  /** Take the inputs of each group of Linears after those before it are compressed; default false: once per block. */
  subset?: boolean
  /** Where the activations of all tokens are kept; default `auto`: in memory if they fit. Changes no bit of the output. */
  activations?: 'auto' | 'memory' | 'disk'
}

/** The calibration of a job, with every default filled in. */
export interface RecipeCalibration {
  sources: RecipeCalibrationSource[]
  length: number
  subset: boolean
}

/** A file of a {@link RecipeCalibration}. */
export interface RecipeCalibrationSource {
  file: string
  kind: CalibrationKind
  field: string
  sequences: number
  seed: number | null
  holdOut: number
  /** How often each of its tokens counts. */
  weight: number
}

/** What a calibration file holds. */
export type CalibrationKind = 'text' | 'jsonl' | 'tokens' | 'statistics'

/** What a source has given to the statistics of a job. */
export interface CalibrationShare {
  file: string
  kind: CalibrationKind
  /** Tokens that took part, or that the statistics were taken from. */
  tokens: number
  /** How often each of them counts. */
  weight: number
  /** What all of them count, as a share of all sources. */
  share: number
}

const sourceSchema = {
  text: optional(text),
  file: optional(text),
  field: optional(text),
  sequences: optional(integer({ min: 1, max: 2 ** 20 })),
  seed: optional(integer({ min: 0 })),
  holdOut: optional(integer({ min: 0, max: 2 ** 20 })),
}

/** Checks {@link CalibrationOptions}. */
export const calibrationSchema = object({
  ...sourceSchema,
  field: withDefault(text, 'text'),
  sequences: withDefault(integer({ min: 1, max: 2 ** 20 }), 128),
  sources: optional(listOf(object({ ...sourceSchema, weight: optional(number({ min: 1e-6, max: 1e6 })) }))),
  length: withDefault(integer({ min: 2, max: 2 ** 20 }), 2048),
  subset: withDefault(boolean, false),
  activations: withDefault(oneOf(['auto', 'memory', 'disk']), 'auto'),
})

/** What the addon takes for a calibration: files, each with everything that is known about it. */
export function calibrationRequest(calibration: ReturnType<typeof calibrationSchema>): BindingCalibration {
  const { length, subset, activations, sources, text, file, ...usual } = calibration
  const common = { weight: 1, ...withoutUndefined(usual) }
  const given = sources ?? [{ text, file }]
  const named = given.map((source, index) => {
    checkNames(source, sources === undefined ? 'calibration' : `calibration.sources[${index}]`)
    return { ...common, ...withoutUndefined(source) }
  })
  if (sources !== undefined && (text !== undefined || file !== undefined)) {
    throw invalid('calibration.sources', 'calibration names a file and sources', 'Put the file among the sources.')
  }
  if (named.length === 0) {
    throw invalid('calibration.sources', 'calibration has no sources', 'Give at least one text or file of statistics.')
  }
  return { sources: named, length, subset, activations }
}

function checkNames({ text, file }: Pick<Checked<typeof sourceSchema>, 'text' | 'file'>, name: string): void {
  if ((text === undefined) !== (file === undefined)) return
  const message = text === undefined ? `${name} names no file` : `${name} names two files`
  throw invalid(`${name}.file`, message, 'Give either text, a plain text, or file, whose ending says what it holds.')
}

function invalid(subject: string, message: string, hint: string): KintsugiError {
  return new KintsugiError({ code: 'ERR_OPTION_INVALID', message, subject, hint })
}
