// The arrows that docs/design/architecture.md allows, against the code.
import { execFileSync } from 'node:child_process'
import { readdirSync, readFileSync } from 'node:fs'
import { dirname, join, normalize, relative } from 'node:path'

import test from 'ava'
import ts from 'typescript'

import { ROOT } from './fixtures.js'

/** Which of our crates each crate may use, outside of tests. */
const CRATES: Record<string, string[]> = {
  runtime: [],
  weights: ['runtime'],
  linalg: ['runtime'],
  calibration: ['linalg', 'runtime'],
  kernels: ['weights', 'runtime'],
  checkpoint: ['weights', 'runtime'],
  compress: ['calibration', 'linalg', 'weights', 'runtime'],
  compensate: ['calibration', 'linalg', 'weights', 'runtime'],
  merge: ['linalg', 'weights', 'runtime'],
  model: ['kernels', 'checkpoint', 'weights', 'runtime'],
  pipeline: ['compress', 'compensate', 'merge', 'model', 'calibration', 'kernels', 'checkpoint', 'linalg', 'weights', 'runtime'],
  node: ['pipeline', 'compress', 'merge', 'model', 'kernels', 'checkpoint', 'weights', 'runtime'],
  testkit: ['weights', 'runtime'],
}

/** Crates from elsewhere that only some of ours may use. */
const CONFINED: Record<string, string[]> = {
  napi: ['node'],
  'napi-derive': ['node'],
  'candle-core': ['model'],
  tokenizers: ['model'],
  faer: ['linalg'],
  safetensors: ['checkpoint', 'testkit'],
}

interface Metadata {
  packages: { name: string; dependencies: { name: string; kind: string | null }[] }[]
}

const metadata = JSON.parse(
  execFileSync('cargo', ['metadata', '--no-deps', '--format-version', '1', '--locked'], {
    cwd: ROOT,
    encoding: 'utf8',
    maxBuffer: 1 << 26,
  }),
) as Metadata

const short = (name: string): string => name.replace(/^kintsugi-/, '')

test('crates use only the crates to their right', (t) => {
  t.deepEqual(metadata.packages.map(({ name }) => short(name)).sort(), Object.keys(CRATES).sort())
  for (const { name, dependencies } of metadata.packages) {
    for (const dependency of dependencies) {
      if (!dependency.name.startsWith('kintsugi-')) continue
      const allowed = [...CRATES[short(name)]!, ...(dependency.kind === 'dev' ? ['testkit'] : [])]
      t.true(allowed.includes(short(dependency.name)), `${name} must not use ${dependency.name}`)
    }
  }
})

test('libraries that belong to one crate stay there', (t) => {
  for (const { name, dependencies } of metadata.packages) {
    for (const { name: used } of dependencies) {
      const owners = CONFINED[used]
      if (owners) t.true(owners.includes(short(name)), `${name} must not use ${used}`)
    }
  }
  for (const [library, owners] of Object.entries(CONFINED)) {
    const used = metadata.packages.some(({ dependencies }) => dependencies.some(({ name }) => name === library))
    t.true(used, `${library} is confined to ${owners.join(', ')} and used by none`)
  }
})

/** `crate version features` of everything that a build compiles. */
function compiled(...selection: string[]): Set<string> {
  const command = ['tree', '--locked', '--prefix', 'none', '--no-dedupe', '--format', '{p} {f}', ...selection]
  return new Set(execFileSync('cargo', command, { cwd: ROOT, encoding: 'utf8', maxBuffer: 1 << 26 }).split('\n'))
}

// Another feature anywhere, and cargo compiles the crate and all that stand on it once for the addon and once more for
// the tests. What the addon needs, its own manifest asks for (see getrandom in crates/node).
test('the tests use every dependency with the features that the addon has', (t) => {
  const inTests = compiled('--workspace', '--edges', 'normal,build,dev')
  const twice = [...compiled('--package', 'kintsugi-node', '--edges', 'normal,build')].filter((it) => !inTests.has(it))
  t.deepEqual(twice, [])
  // `napi build` names the target of this machine, and so must all others.
  t.regex(readFileSync(join(ROOT, '.cargo/config.toml'), 'utf8'), /^target = "host-tuple"$/m)
})

/** Paths below the root that each TypeScript source imports, packages left out. */
function imports(): Map<string, string[]> {
  const found = new Map<string, string[]>()
  for (const file of readdirSync(join(ROOT, 'src'), { recursive: true, encoding: 'utf8' })) {
    if (!file.endsWith('.ts')) continue
    const path = join('src', file)
    const { importedFiles } = ts.preProcessFile(readFileSync(join(ROOT, path), 'utf8'))
    const local = importedFiles.map(({ fileName }) => fileName).filter((name) => name.startsWith('.'))
    const resolved = local.map((name) => relative(ROOT, normalize(join(ROOT, dirname(path), name))))
    found.set(
      path,
      resolved.map((name) => name.replace(/\.js$/, '.ts')),
    )
  }
  return found
}

test('the command line uses the public API and nothing behind it', (t) => {
  const commands = [...imports()].filter(([path]) => path.startsWith(join('src', 'cli')))
  t.true(commands.length > 5)
  for (const [path, used] of commands) {
    for (const name of used) {
      t.true(name === join('src', 'index.ts') || name.startsWith(join('src', 'cli')), `${path} must not use ${name}`)
    }
  }
})

test('only native.ts touches the addon, and the API does not use the command line', (t) => {
  const library = [...imports()].filter(([path]) => !path.startsWith(join('src', 'cli')))
  for (const [path, used] of library) {
    for (const name of used) {
      t.true(name !== 'index.ts' || path === join('src', 'native.ts'), `${path} must not use the addon`)
      t.false(name.startsWith(join('src', 'cli')), `${path} must not use ${name}`)
      t.not(name, join('src', 'index.ts'), `${path} must not use its own index`)
    }
  }
  t.true(imports().get(join('src', 'native.ts'))!.includes('index.ts'))
})

test('imports have no circles', (t) => {
  const graph = imports()
  const finished = new Set<string>()
  const visit = (path: string, trail: string[]): void => {
    if (finished.has(path)) return
    if (trail.includes(path)) return t.fail([...trail, path].join(' → '))
    for (const next of graph.get(path) ?? []) visit(next, [...trail, path])
    finished.add(path)
  }
  for (const path of graph.keys()) visit(path, [])
  t.true([...graph.keys()].every((path) => finished.has(path)))
})
