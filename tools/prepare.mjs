// Makes a fresh clone ready: dependencies, the native addon, dist/. What is current already is left alone, so that
// a second run starts at once. Needs nothing but Node.js, cargo and a C compiler.
import { spawn } from 'node:child_process'
import { createHash } from 'node:crypto'
import { existsSync, mkdirSync, readdirSync, readFileSync, statSync, writeFileSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'

export const root = fileURLToPath(new URL('..', import.meta.url))

const ADDON_INPUTS = ['Cargo.toml', 'Cargo.lock', 'rust-toolchain.toml', 'package.json', 'crates']
const ADDON_OUTPUTS = ['index.js', 'index.d.ts']
const NAPI_BUILD = [
  ...['node_modules/@napi-rs/cli/dist/cli.js', 'build', '--platform', '--release', '--esm', '--no-const-enum'],
  ...['--manifest-path', 'crates/node/Cargo.toml', '--package', 'kintsugi-node'],
  ...['--package-json-path', 'package.json', '--output-dir', '.', '--js', 'index.js', '--dts', 'index.d.ts'],
]

/** Brings everything up to date. */
export async function prepare() {
  requireNode()
  await ensure({
    what: 'dependencies',
    stamp: 'node_modules/.kintsugi-dependencies',
    inputs: ['package-lock.json'],
    outputs: ['node_modules/tsx', 'node_modules/typescript'],
    run: () => run(npm(), ['ci', '--no-audit', '--no-fund'], { shell: process.platform === 'win32' }),
  })
  await ensure({
    what: 'native addon (a few minutes the first time)',
    stamp: 'target/.kintsugi-addon',
    inputs: ADDON_INPUTS,
    // Generated files count as inputs too: an edited one is generated anew.
    outputs: [...ADDON_OUTPUTS, addonFile()],
    hashOutputs: true,
    run: async () => {
      await requireCargo()
      await run(process.execPath, NAPI_BUILD)
    },
  })
  await ensure({
    what: 'dist/',
    stamp: 'node_modules/.kintsugi-dist',
    inputs: ['src', 'index.d.ts', 'tsconfig.json', 'tsconfig.build.json', 'package-lock.json'],
    outputs: ['dist/index.js'],
    run: () => run(process.execPath, ['node_modules/typescript/bin/tsc', '-p', 'tsconfig.build.json']),
  })
}

/** Runs a program in the repository; its output goes to stderr. Rejects when it fails. */
function run(program, args, options = {}) {
  return new Promise((resolve, reject) => {
    const child = spawn(program, args, { cwd: root, stdio: ['ignore', 2, 2], ...options })
    child.on('error', reject)
    child.on('close', (code) =>
      code === 0 ? resolve() : reject(new Error(`${program} ${args[0]} failed (exit code ${code})`)),
    )
  })
}

async function ensure({ what, stamp, inputs, outputs, hashOutputs = false, run: make }) {
  const current = () => digest(hashOutputs ? [...inputs, ...outputs] : inputs)
  const stampFile = join(root, stamp)
  const complete = outputs.every((output) => existsSync(join(root, output)))
  if (complete && existsSync(stampFile) && readFileSync(stampFile, 'utf8') === current()) return
  process.stderr.write(`preparing ${what} …\n`)
  await make()
  mkdirSync(dirname(stampFile), { recursive: true })
  writeFileSync(stampFile, current())
}

/** Hash of the names and contents of files and of all files below folders. */
function digest(paths) {
  const hash = createHash('sha256')
  const add = (path) => {
    const entry = statSync(join(root, path), { throwIfNoEntry: false })
    if (entry?.isDirectory()) {
      for (const name of readdirSync(join(root, path)).sort()) add(`${path}/${name}`)
    } else if (entry) {
      hash.update(`${path}\0`).update(readFileSync(join(root, path)))
    }
  }
  for (const path of paths) add(path)
  return hash.digest('hex')
}

/** The binary of this platform, as the loader looks for it. */
function addonFile() {
  const { platform, arch } = process
  if (platform === 'win32') return `kintsugi.win32-${arch}-msvc.node`
  if (platform !== 'linux') return `kintsugi.${platform}-${arch}.node`
  const { header } = process.report.getReport()
  return `kintsugi.linux-${arch}-${header.glibcVersionRuntime ? 'gnu' : 'musl'}.node`
}

function npm() {
  return process.platform === 'win32' ? 'npm.cmd' : 'npm'
}

function requireNode() {
  const [major, minor] = process.versions.node.split('.').map(Number)
  if ((major === 20 && minor >= 19) || (major === 22 && minor >= 12) || major >= 24) return
  fail(`Node.js 20.19, 22.12 or 24 and later is needed; this is ${process.versions.node}.`)
}

async function requireCargo() {
  try {
    await run('cargo', ['--version'])
  } catch {
    fail(
      'cargo was not found. Install Rust from https://rustup.rs (the right version is chosen by rust-toolchain.toml).',
    )
  }
}

function fail(message) {
  process.stderr.write(`${message}\n`)
  process.exit(1)
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  await prepare().catch((error) => fail(error.message))
}
