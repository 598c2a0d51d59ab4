import { KintsugiError } from './errors.js'
import type { BindingCalibration } from './native.js'
import { boolean, integer, object, oneOf, optional, text, withDefault, withoutUndefined } from './options.js'

/** Where calibration statistics come from: `text` or `file`. */
export interface CalibrationOptions {
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
  /** Tokens of a sequence, default 2048. */
  length?: number
  /** Chooses the sequences by chance, the same for the same seed; by default those at the beginning are taken. */
  seed?: number
  /**
   * Compensation: sequences behind those that take no part in the statistics; errors are measured on them, too. By default
   * an eighth of `sequences`, while that is no more than 2048 tokens; fewer where the file is short.
   */
  holdOut?: number
  /** Take the inputs of each group of Linears after those before it are compressed; default false: once per block. */
  subset?: boolean
  /** Where the activations of all tokens are kept; default `auto`: in memory if they fit. Changes no bit of the output. */
  activations?: 'auto' | 'memory' | 'disk'
}

/** The calibration of a job, with every default filled in. */
export interface RecipeCalibration {
  file: string
  kind: 'text' | 'jsonl' | 'tokens' | 'statistics'
  field: string
  sequences: number
  length: number
  seed: number | null
  holdOut: number
  subset: boolean
}

/** Checks {@link CalibrationOptions}. */
export const calibrationSchema = object({
  text: optional(text),
  file: optional(text),
  field: withDefault(text, 'text'),
  sequences: withDefault(integer({ min: 1, max: 2 ** 20 }), 128),
  length: withDefault(integer({ min: 2, max: 2 ** 20 }), 2048),
  seed: optional(integer({ min: 0 })),
  holdOut: optional(integer({ min: 0, max: 2 ** 20 })),
  subset: withDefault(boolean, false),
  activations: withDefault(oneOf(['auto', 'memory', 'disk']), 'auto'),
})

/** What the addon takes for a calibration: one file. */
export function calibrationRequest(calibration: ReturnType<typeof calibrationSchema>): BindingCalibration {
  const { text, file } = calibration
  if ((text === undefined) !== (file === undefined)) return withoutUndefined(calibration)
  throw new KintsugiError({
    code: 'ERR_OPTION_INVALID',
    message: text === undefined ? 'calibration names no file' : 'calibration names two files',
    subject: 'calibration.file',
    hint: 'Give either text, a plain text, or file, whose ending says what it holds.',
  })
}
