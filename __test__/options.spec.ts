import test from 'ava'
import fc from 'fast-check'

import { KintsugiError } from '../src/errors.js'
import {
  abortSignal,
  boolean,
  checkOptions,
  groupSize,
  integer,
  nearest,
  number,
  object,
  oneOf,
  optional,
  signalOf,
  text,
  textsByName,
  texts,
  withDefault,
  withoutUndefined,
} from '../src/options.js'

const schema = {
  out: text,
  bits: withDefault(oneOf([2, 3, 4, 8]), 4),
  groupSize: withDefault(groupSize, 128),
  damping: withDefault(number({ min: 0, max: 1 }), 0.01),
  symmetric: withDefault(boolean, false),
  calibration: optional(object({ text, sequences: withDefault(integer({ min: 1 }), 128) })),
  signal: optional(abortSignal),
}

function refusal(options: unknown): KintsugiError {
  try {
    checkOptions(options, schema)
  } catch (error) {
    if (error instanceof KintsugiError) return error
    throw error
  }
  throw new Error('the options were accepted')
}

test('defaults fill what is not given', (t) => {
  t.deepEqual(checkOptions({ out: 'x' }, schema), {
    out: 'x',
    bits: 4,
    groupSize: 128,
    damping: 0.01,
    symmetric: false,
    calibration: undefined,
    signal: undefined,
  })
  t.deepEqual(checkOptions({ out: 'x', calibration: { text: 'c' } }, schema).calibration, { text: 'c', sequences: 128 })
})

test('an option that is not known is named with the nearest one', (t) => {
  const error = refusal({ out: 'x', grupSize: 64 })
  t.is(error.code, 'ERR_OPTION_UNKNOWN')
  t.is(error.subject, 'grupSize')
  t.regex(error.hint, /Did you mean 'groupSize'\?/)

  const nested = refusal({ out: 'x', calibration: { text: 'c', sequence: 3 } })
  t.is(nested.subject, 'calibration.sequence')
  t.regex(nested.hint, /'calibration\.sequences'/)
})

test('a key that is undefined counts as not given, an unknown one is still refused', (t) => {
  t.is(checkOptions({ out: 'x', bits: undefined }, schema).bits, 4)
  t.is(refusal({ out: 'x', bit: undefined }).code, 'ERR_OPTION_UNKNOWN')
})

for (const [name, value, rule] of [
  ['out', undefined, /must be a string that is not empty, but it is missing/],
  ['out', '', /not empty/],
  ['bits', 5, /one of 2, 3, 4, 8, but it is 5/],
  ['bits', '4', /one of 2, 3, 4, 8, but it is '4'/],
  ['groupSize', 0, /from 1 to 1048576 or 'whole'/],
  ['groupSize', 1.5, /whole/],
  ['damping', Number.NaN, /number from 0 to 1, but it is NaN/],
  ['damping', -0.1, /from 0 to 1/],
  ['symmetric', 1, /true or false/],
  ['calibration', 'file.txt', /must be an object, but it is 'file.txt'/],
  ['calibration', null, /must be an object, but it is null/],
  ['calibration', [], /must be an object, but it is an array/],
  ['signal', {}, /AbortSignal, but it is an object/],
] as const) {
  test(`${name}: ${JSON.stringify(value)} is refused`, (t) => {
    const error = refusal({ out: 'x', [name]: value })
    t.is(error.code, 'ERR_OPTION_INVALID')
    t.is(error.subject, name)
    t.regex(error.message, rule)
  })
}

test('options that are no object are refused', (t) => {
  for (const options of [null, 'x', 3, []]) t.is(refusal(options).code, 'ERR_OPTION_INVALID')
})

test('lists and maps of texts name the entry that is wrong', (t) => {
  t.throws(() => texts(['a', 3], 'stop'), { message: /stop\[1\] must be a string/ })
  t.throws(() => textsByName({ legal: '' }, 'adapters'), { message: /adapters\.legal/ })
})

test('a valid whole number is accepted, any other value refused', (t) => {
  const rule = integer({ min: 1, max: 100 })
  fc.assert(
    fc.property(fc.oneof(fc.integer(), fc.double(), fc.string(), fc.constant(undefined)), (value) => {
      const valid = typeof value === 'number' && Number.isInteger(value) && value >= 1 && value <= 100
      try {
        return rule(value, 'n') === value && valid
      } catch (error) {
        return error instanceof KintsugiError && !valid
      }
    }),
  )
  t.pass()
})

test('the nearest candidate has the fewest edits', (t) => {
  t.is(nearest('groupsize', ['bits', 'groupSize', 'method']), 'groupSize')
  t.is(nearest('gtpq', ['rtn', 'gptq']), 'gptq')
  t.is(nearest('x', []), undefined)
  fc.assert(fc.property(fc.array(fc.string(), { minLength: 1 }), (names) => names.includes(nearest(names[0]!, names)!)))
})

test('a signal is found before the options are checked', (t) => {
  const { signal } = new AbortController()
  t.is(signalOf({ signal }), signal)
  for (const options of [undefined, null, 3, {}, { signal: 'x' }]) t.is(signalOf(options), undefined)
})

test('undefined fields are left out for the addon', (t) => {
  t.deepEqual(Object.keys(withoutUndefined({ a: 1, b: undefined, c: null })), ['a', 'c'])
})
