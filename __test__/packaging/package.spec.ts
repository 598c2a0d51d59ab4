import { execFile } from 'node:child_process'
import { mkdirSync, readdirSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { promisify } from 'node:util'

import test from 'ava'
import { publint } from 'publint'

import { ROOT, temporaryFolder } from '../fixtures.js'

const run = promisify(execFile)
const npm = process.platform === 'win32' ? 'npm.cmd' : 'npm'

const PRODUCT = `
  const layer = QuantizedLinear.quantize(new Float32Array(4 * 32).fill(0.5), { outFeatures: 4, inFeatures: 32, groupSize: 32 })
  const y = layer.forward(new Float32Array(32).fill(1))
  layer.dispose()
  console.log(y.length, y.every((value) => Math.abs(value - 16) < 0.1), typeof loadModel, typeof compress)
`

test('the packed package installs without scripts, and import and require compute', async (t) => {
  t.timeout(180_000)
  const folder = temporaryFolder(t)
  const { stdout } = await run(npm, ['pack', '--json', '--ignore-scripts', '--pack-destination', folder], { cwd: ROOT })
  const [{ filename, files }] = JSON.parse(stdout) as [{ filename: string; files: { path: string }[] }]
  const paths = files.map(({ path }) => path)
  for (const path of [
    'index.js',
    'index.d.ts',
    'package.json',
    'dist/index.js',
    'dist/index.d.ts',
    'dist/cli/main.js',
  ]) {
    t.true(paths.includes(path), path)
  }
  t.is(paths.filter((path) => path.endsWith('.node')).length, 1)
  t.deepEqual(
    paths.filter((path) => /^(assets|crates|src|__test__|examples|tools|target)\/|\.kintsugi|Cargo/.test(path)),
    [],
  )

  const project = join(folder, 'project')
  mkdirSync(project)
  writeFileSync(join(project, 'package.json'), '{ "private": true }')
  const tarball = readdirSync(folder).find((name) => name === filename || name.endsWith('.tgz'))!
  await run(
    npm,
    ['install', '--ignore-scripts', '--prefer-offline', '--no-audit', '--no-fund', join(folder, tarball)],
    {
      cwd: project,
    },
  )

  const names = '{ QuantizedLinear, loadModel, compress }'
  writeFileSync(join(project, 'esm.mjs'), `import ${names} from 'kintsugi'\n${PRODUCT}`)
  writeFileSync(join(project, 'cjs.cjs'), `const ${names} = require('kintsugi')\n${PRODUCT}`)
  for (const script of ['esm.mjs', 'cjs.cjs']) {
    const result = await run(process.execPath, [script], { cwd: project })
    t.is(result.stdout, '4 true function function\n', script)
    t.is(result.stderr, '', script)
  }
  const command = join(project, 'node_modules/.bin', process.platform === 'win32' ? 'kintsugi.cmd' : 'kintsugi')
  t.regex((await run(command, ['--help'])).stdout, /Usage: kintsugi/)
})

test('publint finds nothing to complain about', async (t) => {
  const { messages } = await publint({ pkgDir: ROOT, strict: true })
  t.deepEqual(messages, [])
})
