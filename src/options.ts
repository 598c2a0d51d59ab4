import { KintsugiError } from './errors.js'

/**
 * Checks one value and fills in its default. `name` is the full option name, for the error.
 * A rule that gets `undefined` returns its default, or throws when it has none.
 */
export type Rule<T> = (value: unknown, name: string) => T

/** The rule of each key of an options object. */
export type Schema = Record<string, Rule<unknown>>

/** What {@link checkOptions} makes of a schema. */
export type Checked<S extends Schema> = { [K in keyof S]: ReturnType<S[K]> }

/**
 * Checks `options` against `schema` before any work starts: an unknown key is named together with the nearest valid
 * one, a value of the wrong type or range with what is allowed.
 *
 * @throws KintsugiError `ERR_OPTION_UNKNOWN`, `ERR_OPTION_INVALID`
 */
export function checkOptions<S extends Schema>(options: unknown, schema: S, prefix = ''): Checked<S> {
  if (options === undefined) options = {}
  if (typeof options !== 'object' || options === null || Array.isArray(options)) {
    throw invalid(prefix.slice(0, -1) || 'options', 'must be an object', options)
  }
  const given = options as Record<string, unknown>
  const names = Object.keys(schema)
  for (const key of Object.keys(given)) {
    if (!names.includes(key)) throw unknown(prefix + key, nearest(key, names), prefix, names)
  }
  const checked: Record<string, unknown> = {}
  for (const name of names) checked[name] = schema[name]!(given[name], prefix + name)
  return checked as Checked<S>
}

/** A whole number in `[min, max]`. */
export function integer({ min, max = Number.MAX_SAFE_INTEGER }: Range): Rule<number> {
  return (value, name) => {
    if (Number.isInteger(value) && (value as number) >= min && (value as number) <= max) return value as number
    throw invalid(name, `must be a whole number ${between(min, max)}`, value)
  }
}

/** A finite number in `[min, max]`. */
export function number({ min, max = Number.MAX_VALUE }: Range): Rule<number> {
  return (value, name) => {
    if (typeof value === 'number' && value >= min && value <= max) return value
    throw invalid(name, `must be a number ${between(min, max)}`, value)
  }
}

/** One of `values`. */
export function oneOf<const T extends string | number>(values: readonly T[], hint?: string): Rule<T> {
  return (value, name) => {
    if (values.includes(value as T)) return value as T
    const list = values.map(show).join(', ')
    const near = typeof value === 'string' ? nearest(value, values.map(String)) : undefined
    throw invalid(name, `must be one of ${list}`, value, hint ?? (near ? `Did you mean ${show(near)}?` : undefined))
  }
}

/** Text that is not empty. */
export const text: Rule<string> = (value, name) => {
  if (typeof value === 'string' && value.length > 0) return value
  throw invalid(name, 'must be a string that is not empty', value)
}

/** Text, empty or not. */
export const string: Rule<string> = (value, name) => {
  if (typeof value === 'string') return value
  throw invalid(name, 'must be a string', value)
}

/** True or false. */
export const boolean: Rule<boolean> = (value, name) => {
  if (typeof value === 'boolean') return value
  throw invalid(name, 'must be true or false', value)
}

/** A list of texts. */
export const texts: Rule<string[]> = (value, name) => {
  if (Array.isArray(value)) return value.map((item, index) => text(item, `${name}[${index}]`))
  throw invalid(name, 'must be an array of strings', value)
}

/** A list of what `rule` takes. */
export function listOf<T>(rule: Rule<T>): Rule<T[]> {
  return (value, name) => {
    if (Array.isArray(value)) return value.map((item, index) => rule(item, `${name}[${index}]`))
    throw invalid(name, 'must be an array', value)
  }
}

/** A list of finite numbers. */
export const numbers: Rule<number[]> = (value, name) => {
  if (!Array.isArray(value)) throw invalid(name, 'must be an array of numbers', value)
  return value.map((item, index) => number({ min: -Number.MAX_VALUE })(item, `${name}[${index}]`))
}

/** Texts by name. */
export const textsByName: Rule<Record<string, string>> = (value, name) => {
  if (typeof value === 'object' && value !== null && !Array.isArray(value)) {
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, text(item, `${name}.${key}`)]))
  }
  throw invalid(name, 'must be an object of strings', value)
}

/** Finite numbers by name. */
export const numbersByName: Rule<Record<string, number>> = (value, name) => {
  if (typeof value === 'object' && value !== null && !Array.isArray(value)) {
    const finite = number({ min: -Number.MAX_VALUE })
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, finite(item, `${name}.${key}`)]))
  }
  throw invalid(name, 'must be an object of numbers', value)
}

/** An `AbortSignal`, of this or another realm. */
export const abortSignal: Rule<AbortSignal> = (value, name) => {
  if (isAbortSignal(value)) return value
  throw invalid(name, 'must be an AbortSignal', value)
}

/** Codes in a group along the input: a number of inputs, or `'whole'` for one group per output row. */
export const groupSize: Rule<number | 'whole'> = (value, name) => {
  if (value === 'whole') return value
  if (Number.isInteger(value) && (value as number) >= 1 && (value as number) <= MAX_GROUP) return value as number
  throw invalid(name, `must be a whole number ${between(1, MAX_GROUP)} or 'whole'`, value)
}

const MAX_GROUP = 2 ** 20

/** An object with a schema of its own. */
export function object<S extends Schema>(schema: S): Rule<Checked<S>> {
  return (value, name) => {
    if (value === undefined) throw invalid(name, 'must be an object', value)
    return checkOptions(value, schema, `${name}.`)
  }
}

/** `rule`, but `fallback` when the option is not given. */
export function withDefault<T>(rule: Rule<T>, fallback: T): Rule<T> {
  return (value, name) => (value === undefined ? fallback : rule(value, name))
}

/** `rule`, but `undefined` when the option is not given. */
export function optional<T>(rule: Rule<T>): Rule<T | undefined> {
  return (value, name) => (value === undefined ? undefined : rule(value, name))
}

/** The `signal` of options that have not been checked yet, if it is one. */
export function signalOf(options: unknown): AbortSignal | undefined {
  if (typeof options !== 'object' || options === null || !('signal' in options)) return undefined
  return isAbortSignal(options.signal) ? options.signal : undefined
}

/** `options` without the keys that are `undefined`: the addon tells a missing field by its absence. */
export function withoutUndefined<T extends object>(options: T): { [K in keyof T]: Exclude<T[K], undefined> } {
  const given = Object.entries(options).filter(([, value]) => value !== undefined)
  return Object.fromEntries(given) as { [K in keyof T]: Exclude<T[K], undefined> }
}

/** The candidate with the smallest edit distance to `word`, upper and lower case taken as equal. */
export function nearest(word: string, candidates: readonly string[]): string | undefined {
  const distances = candidates.map((candidate) => editDistance(word.toLowerCase(), candidate.toLowerCase()))
  return candidates[distances.indexOf(Math.min(...distances))]
}

interface Range {
  min: number
  max?: number
}

function isAbortSignal(value: unknown): value is AbortSignal {
  return typeof value === 'object' && value !== null && 'aborted' in value && 'addEventListener' in value
}

function editDistance(a: string, b: string): number {
  let row = Array.from({ length: b.length + 1 }, (_, j) => j)
  for (let i = 0; i < a.length; i++) {
    const next = [i + 1]
    for (let j = 0; j < b.length; j++) {
      next.push(Math.min(row[j]! + (a[i] === b[j] ? 0 : 1), row[j + 1]! + 1, next[j]! + 1))
    }
    row = next
  }
  return row[b.length]!
}

function between(min: number, max: number): string {
  return max >= Number.MAX_SAFE_INTEGER ? `of at least ${min}` : `from ${min} to ${max}`
}

function show(value: unknown): string {
  if (typeof value === 'string') return `'${value}'`
  if (typeof value === 'object' && value !== null) return Array.isArray(value) ? 'an array' : 'an object'
  return typeof value === 'function' ? 'a function' : String(value)
}

function invalid(name: string, rule: string, value: unknown, hint?: string): KintsugiError {
  const found = value === undefined ? 'it is missing' : `it is ${show(value)}`
  return new KintsugiError({
    code: 'ERR_OPTION_INVALID',
    message: `${name} ${rule}, but ${found}`,
    subject: name,
    hint: hint ?? `Give ${rule.replace(/^must be /, '')}.`,
  })
}

function unknown(name: string, near: string | undefined, prefix: string, names: string[]): KintsugiError {
  return new KintsugiError({
    code: 'ERR_OPTION_UNKNOWN',
    message: `there is no option '${name}'`,
    subject: name,
    hint: near ? `Did you mean '${prefix}${near}'? The options are ${names.join(', ')}.` : 'It takes no options.',
  })
}
