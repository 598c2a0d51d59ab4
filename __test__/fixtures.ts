import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'

import type { ExecutionContext } from 'ava'
import { type ErrorCode, KintsugiError } from 'kintsugi'

export const ROOT = fileURLToPath(new URL('..', import.meta.url))
export const LLAMA = asset('llama-7m')
export const TINY = asset('tinystories-656k')
export const SHAKESPEARE = asset('adapters/shakespeare')
export const CALIBRATION_TEXT = asset('text/calibration-wikipedia.txt')
export const WIKITEXT = asset('text/eval-wikitext.txt')
export const SHAKESPEARE_TEXT = asset('text/eval-shakespeare.txt')
export const STORIES = asset('text/eval-stories.txt')

/** A calibration that takes a moment. */
export const SHORT_CALIBRATION = { text: STORIES, sequences: 4, length: 64 }

/** Absolute path of a file or folder under `assets/`. */
export function asset(path: string): string {
  return join(ROOT, 'assets', path)
}

/** The beginning of a text file. */
export function textSlice(path: string, characters: number): string {
  return readFileSync(path, 'utf8').slice(0, characters)
}

/** A folder that is removed after the test. */
export function temporaryFolder(t: ExecutionContext): string {
  const folder = mkdtempSync(join(tmpdir(), 'kintsugi-test-'))
  t.teardown(() => rmSync(folder, { recursive: true, force: true }))
  return folder
}

/** Asserts that `work` fails with `code`, that the error says what it is about and how to fix it, and returns it. */
export async function failsWith(
  t: ExecutionContext,
  work: () => PromiseLike<unknown> | unknown,
  code: ErrorCode,
  subject?: string | RegExp,
): Promise<KintsugiError | undefined> {
  let error: unknown
  try {
    await work()
  } catch (caught) {
    error = caught
  }
  if (!(error instanceof KintsugiError)) {
    t.fail(`expected ${code}, got ${error === undefined ? 'no error' : String(error)}`)
    return undefined
  }
  t.is(error.code, code, error.message)
  t.not(error.message, '')
  t.not(error.hint, '', `no hint: ${error.message}`)
  t.not(error.subject, '', `no subject: ${error.message}`)
  if (subject instanceof RegExp) t.regex(error.subject, subject)
  else if (subject !== undefined) t.is(error.subject, subject)
  return error
}

/** Numbers that look like weights: normally distributed, the same for the same seed. */
export function gaussian(count: number, seed: number): Float32Array {
  let state = seed >>> 0
  const uniform = (): number => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0
    return (state + 0.5) / 2 ** 32
  }
  return Float32Array.from(
    { length: count },
    () => Math.sqrt(-2 * Math.log(uniform())) * Math.cos(2 * Math.PI * uniform()),
  )
}

/** A safetensors file taken apart. */
export interface Safetensors {
  header: Record<string, { dtype: string; shape: number[]; data_offsets: [number, number] }>
  data: Buffer
}

export function readSafetensors(path: string): Safetensors {
  const bytes = readFileSync(path)
  const length = Number(bytes.readBigUInt64LE(0))
  const { __metadata__: _, ...header } = JSON.parse(bytes.toString('utf8', 8, 8 + length))
  return { header, data: bytes.subarray(8 + length) }
}

/** Writes a safetensors file, damaged or not. */
export function writeSafetensors(path: string, { header, data }: Safetensors, claimedHeaderLength?: number): void {
  const text = Buffer.from(JSON.stringify(header))
  const length = Buffer.alloc(8)
  length.writeBigUInt64LE(BigInt(claimedHeaderLength ?? text.length))
  writeFileSync(path, Buffer.concat([length, text, data]))
}
