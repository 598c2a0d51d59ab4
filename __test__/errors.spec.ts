import { readFileSync } from 'node:fs'
import { join } from 'node:path'

import test from 'ava'

import { ERROR_CODES, fromNative, KintsugiError } from '../src/errors.js'
import { ROOT } from './fixtures.js'

test('the codes are those of the engine, and one of the loader', (t) => {
  const source = readFileSync(join(ROOT, 'crates/runtime/src/error.rs'), 'utf8')
  const engine = [...source.matchAll(/^ {4}\w+ = "(ERR_\w+)",$/gm)].map(([, code]) => code!)
  t.true(engine.length > 20)
  t.deepEqual([...new Set([...engine, 'ERR_ADDON_LOAD'])].sort(), [...ERROR_CODES].sort())
})

test('docs/errors.md lists every code in the words of the engine', (t) => {
  const source = readFileSync(join(ROOT, 'crates/runtime/src/error.rs'), 'utf8')
  const described = [...source.matchAll(/^ {4}\/\/\/ (.+)\n {4}\w+ = "(ERR_\w+)",$/gm)].map(([, text, code]) => [code, text])
  const table = readFileSync(join(ROOT, 'docs/errors.md'), 'utf8')
  const documented = [...table.matchAll(/^\| `(ERR_\w+)` \| (.+) \|$/gm)].map(([, code, text]) => [code, text])
  t.deepEqual(documented.slice(0, -1), described)
  t.is(documented.at(-1)![0], 'ERR_ADDON_LOAD')
})

test('an error of the addon is typed', (t) => {
  const parts = {
    code: 'ERR_TEXT_TOO_SHORT',
    message: 'the text is empty',
    subject: 'a.txt',
    hint: 'Give a longer one',
  }
  const error = fromNative(new Error(JSON.stringify(parts)))
  t.true(error instanceof KintsugiError)
  t.deepEqual(error.toJSON(), parts as ReturnType<KintsugiError['toJSON']>)
  t.is(error.cause, undefined)
  t.regex(error.stack ?? '', /^KintsugiError: the text is empty/)
})

test('anything else from the addon is a defect that keeps its cause', (t) => {
  for (const cause of [
    new Error('Failed to convert'),
    new Error('{"code":"ERR_NOVEL","message":"x"}'),
    'text',
    undefined,
  ]) {
    const error = fromNative(cause)
    t.is(error.code, 'ERR_INTERNAL')
    t.is(error.cause, cause)
    t.not(error.hint, '')
  }
})

test('a typed error stays itself', (t) => {
  const error = new KintsugiError({ code: 'ERR_DISPOSED', message: 'gone' })
  t.is(fromNative(error), error)
  t.deepEqual(Object.keys(error), ['code', 'subject', 'hint'])
})
