/** Every value that `KintsugiError.code` can have; `docs/errors.md` says when each appears. */
export const ERROR_CODES = [
  'ERR_OPTION_INVALID',
  'ERR_OPTION_UNKNOWN',
  'ERR_CHECKPOINT_NOT_FOUND',
  'ERR_CHECKPOINT_SHARD_MISSING',
  'ERR_CHECKPOINT_CORRUPT',
  'ERR_CHECKPOINT_TENSOR_MISSING',
  'ERR_CHECKPOINT_SHAPE',
  'ERR_CHECKPOINT_DTYPE',
  'ERR_CHECKPOINT_NOT_FINITE',
  'ERR_CONFIG_INVALID',
  'ERR_CONFIG_ARCHITECTURE',
  'ERR_CONFIG_UNSUPPORTED',
  'ERR_QUANTIZATION_UNSUPPORTED',
  'ERR_CONVERSION_INEXACT',
  'ERR_TOKENIZER_INVALID',
  'ERR_ADAPTER_INVALID',
  'ERR_ADAPTER_UNKNOWN',
  'ERR_TEXT_TOO_SHORT',
  'ERR_TEXT_UNREADABLE',
  'ERR_OUTPUT_NOT_EMPTY',
  'ERR_OUTPUT_UNWRITABLE',
  'ERR_OUTPUT_BUSY',
  'ERR_OUTPUT_SPACE',
  'ERR_MEMORY_EXCEEDED',
  'ERR_RESUME_MISMATCH',
  'ERR_STATISTICS_MISMATCH',
  'ERR_SHAPE_MISMATCH',
  'ERR_VALUE_NOT_FINITE',
  'ERR_SOLVER_FAILED',
  'ERR_CONTEXT_EXCEEDED',
  'ERR_CPU_LEVEL',
  'ERR_CANCELLED',
  'ERR_DISPOSED',
  'ERR_IO',
  'ERR_INTERNAL',
  'ERR_ADDON_LOAD',
] as const

/** Stable name of a failure. */
export type ErrorCode = (typeof ERROR_CODES)[number]

/** The parts of a {@link KintsugiError}. */
export interface ErrorParts {
  code: ErrorCode
  message: string
  subject?: string
  hint?: string
  cause?: unknown
}

/** What went wrong (`code`, `message`), with what (`subject`), and what to do about it (`hint`). */
export class KintsugiError extends Error {
  /** Stable name of the failure. */
  readonly code: ErrorCode
  /** What it was wrong with: a path, a tensor name, an option name. May be empty. */
  readonly subject: string
  /** How to fix it. May be empty. */
  readonly hint: string

  constructor({ code, message, subject = '', hint = '', cause }: ErrorParts) {
    super(message, cause === undefined ? undefined : { cause })
    this.code = code
    this.subject = subject
    this.hint = hint
  }

  /** The shape that `--json` prints. */
  toJSON(): { code: ErrorCode; message: string; subject: string; hint: string } {
    return { code: this.code, message: this.message, subject: this.subject, hint: this.hint }
  }
}

// On the prototype, as for the built-in errors: stack traces start with it and instances do not list it.
Object.defineProperty(KintsugiError.prototype, 'name', { value: 'KintsugiError', configurable: true, writable: true })

/**
 * The error of a call into the addon, typed. The addon puts `{ code, message, subject, hint }` as JSON into the
 * message; anything else that arrives here is a defect of the binding and keeps its original as `cause`.
 */
export function fromNative(error: unknown): KintsugiError {
  if (error instanceof KintsugiError) return error
  const message = error instanceof Error ? error.message : String(error)
  const parts = parseParts(message)
  if (parts) return new KintsugiError(parts)
  return new KintsugiError({
    code: 'ERR_INTERNAL',
    message,
    hint: 'This is a defect in kintsugi; please report it with the output of `kintsugi doctor`.',
    cause: error,
  })
}

function parseParts(message: string): ErrorParts | undefined {
  let value: unknown
  try {
    value = JSON.parse(message)
  } catch {
    return undefined
  }
  if (typeof value !== 'object' || value === null) return undefined
  const { code, message: text, subject, hint } = value as Record<string, unknown>
  if (typeof text !== 'string' || !ERROR_CODES.includes(code as ErrorCode)) return undefined
  return {
    code: code as ErrorCode,
    message: text,
    subject: typeof subject === 'string' ? subject : '',
    hint: typeof hint === 'string' ? hint : '',
  }
}
