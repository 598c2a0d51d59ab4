import test from 'ava'

import { explainLoadFailure, type LoadEnvironment } from '../src/load-failure.js'

const LINUX: LoadEnvironment = { platform: 'linux-x64', node: '20.19.0', napi: 9, glibc: '2.28' }

/** The chain that the generated loader throws. */
function loaderError(...causes: { message: string; code?: string }[]): Error {
  const chain = causes.reduceRight<Error | undefined>((cause, { message, code }) => {
    const error = new Error(message, cause && { cause })
    return code ? Object.assign(error, { code }) : error
  }, undefined)
  return new Error('Cannot find native binding. npm has a bug related to optional dependencies.', { cause: chain })
}

const MISSING = [
  { message: "Cannot find module './kintsugi.linux-x64-gnu.node'\nRequire stack:\n- x", code: 'MODULE_NOT_FOUND' },
  { message: "Cannot find module 'kintsugi-linux-x64-gnu'\nRequire stack:\n- x", code: 'MODULE_NOT_FOUND' },
]

for (const { what, causes, environment = LINUX, message, hint } of [
  {
    what: 'no binary',
    causes: MISSING,
    message: /no binary for it \(looked for \.\/kintsugi\.linux-x64-gnu\.node, kintsugi-linux-x64-gnu\)/,
    hint: /npm run build/,
  },
  {
    what: 'glibc that is too old',
    causes: [
      {
        message: "/lib/libc.so.6: version `GLIBC_2.34' not found (required by kintsugi.node)",
        code: 'ERR_DLOPEN_FAILED',
      },
      ...MISSING,
    ],
    message: /needs glibc 2\.34 and this system has 2\.28/,
    hint: /npm run build/,
  },
  {
    what: 'binary of another platform',
    causes: [{ message: 'kintsugi.node: invalid ELF header', code: 'ERR_DLOPEN_FAILED' }],
    message: /built for another platform/,
    hint: /node_modules/,
  },
  {
    what: 'addons switched off',
    causes: [{ message: 'Cannot load native addon because loading addons is disabled.', code: 'ERR_DLOPEN_DISABLED' }],
    message: /switched off/,
    hint: /--no-addons/,
  },
  {
    what: 'Node.js that is too old',
    causes: MISSING,
    environment: { ...LINUX, napi: 8 },
    message: /needs Node-API 9 and this Node\.js has 8/,
    hint: /20\.19/,
  },
  {
    what: 'damaged binary',
    causes: [{ message: 'kintsugi.node: file too short', code: 'ERR_DLOPEN_FAILED' }, ...MISSING],
    message: /file too short \(ERR_DLOPEN_FAILED\)/,
    hint: /node_modules/,
  },
]) {
  test(`${what} is diagnosed`, (t) => {
    const thrown = loaderError(...causes)
    const error = explainLoadFailure(thrown, environment)
    t.is(error.code, 'ERR_ADDON_LOAD')
    t.is(error.subject, 'linux-x64')
    t.is(error.cause, thrown)
    t.regex(error.message, /linux-x64, Node\.js 20\.19\.0/)
    t.regex(error.message, message)
    t.regex(error.hint, hint)
    t.notRegex(error.message, /npm has a bug/)
  })
}

test('a chain of causes that bites its tail ends', (t) => {
  const error = new Error('round')
  error.cause = error
  t.is(explainLoadFailure(error, LINUX).code, 'ERR_ADDON_LOAD')
})
