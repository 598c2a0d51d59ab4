import { spawn } from 'node:child_process'

import test from 'ava'

import { ROOT, STORIES, TINY } from '../fixtures.js'

const DEADLINE_MILLISECONDS = 30_000

/** Runs a program against the built package; its code is `null` when it had to be ended. */
function exitCode(
  program: string,
  environment: NodeJS.ProcessEnv = {},
): Promise<{ code: number | null; output: string }> {
  return new Promise((resolve, reject) => {
    const source = `import * as kintsugi from ${JSON.stringify(`${ROOT}dist/index.js`)}\n${program}`
    const child = spawn(process.execPath, ['--input-type=module', '--eval', source], {
      env: { ...process.env, ...environment },
      timeout: DEADLINE_MILLISECONDS,
    })
    let output = ''
    for (const stream of [child.stdout, child.stderr]) stream.setEncoding('utf8').on('data', (text) => (output += text))
    child.on('error', reject)
    child.on('close', (code) => resolve({ code, output }))
  })
}

const MODEL = JSON.stringify(TINY)
const TEXT = `(await import('node:fs')).readFileSync(${JSON.stringify(STORIES)}, 'utf8')`

for (const [what, program] of [
  ['after load and dispose', `const model = await kintsugi.loadModel(${MODEL}); model.dispose()`],
  ['without dispose', `globalThis.model = await kintsugi.loadModel(${MODEL})`],
  [
    'with a generation that was left',
    `
    const model = await kintsugi.loadModel(${MODEL})
    for await (const piece of model.generate('Once', { maxTokens: 400 })) break`,
  ],
  [
    'with a generation that was forgotten',
    `
    const model = await kintsugi.loadModel(${MODEL})
    await model.generate('Once', { maxTokens: 400 }).next()`,
  ],
  [
    'after a job that was cancelled',
    `
    const model = await kintsugi.loadModel(${MODEL})
    const job = model.perplexity(${TEXT}, { length: 256 })
    setTimeout(() => job.cancel(), 50)
    await job.catch((error) => { if (error.code !== 'ERR_CANCELLED') throw error })`,
  ],
  [
    'after a job of which only the progress was read',
    `
    const model = await kintsugi.loadModel(${MODEL})
    let readings = 0
    for await (const reading of model.perplexity(${TEXT}.slice(0, 60000), { length: 256 }).progress()) readings++
    if (readings === 0) throw new Error('the loop ended at once')`,
  ],
] as const) {
  test(`a process ends by itself ${what}`, async (t) => {
    const { code, output } = await exitCode(program)
    t.is(code, 0, output)
    t.is(output, '', 'the library prints nothing')
  })
}

test('a process may exit in the middle of a job', async (t) => {
  const { code, output } = await exitCode(`
    const model = await kintsugi.loadModel(${MODEL})
    model.perplexity(${TEXT}, { length: 256 }).catch(() => {})
    setTimeout(() => process.exit(7), 50)`)
  t.is(code, 7, output)
})

test('a failed job that nobody awaits is an unhandled rejection, as for any promise', async (t) => {
  const { code, output } = await exitCode(`kintsugi.loadModel('/no/such/folder')`)
  t.is(code, 1)
  t.regex(output, /KintsugiError[^]*ERR_CHECKPOINT_NOT_FOUND/)
})

test('importing loads nothing: without the addon, the first call says what to do', async (t) => {
  const program = `
    const error = await kintsugi.loadModel(${MODEL}).catch((error) => error)
    console.log(error.code, error.hint)`
  const { code, output } = await exitCode(program, { NAPI_RS_NATIVE_LIBRARY_PATH: '/no/such/addon.node' })
  t.is(code, 0, output)
  t.regex(output, /^ERR_ADDON_LOAD .+/)
})
