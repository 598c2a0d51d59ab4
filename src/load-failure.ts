import { KintsugiError } from './errors.js'

/** What of this process decides whether the addon can load. */
export interface LoadEnvironment {
  /** `process.platform`, `-`, `process.arch`. */
  platform: string
  /** Node.js version without the `v`. */
  node: string
  /** Node-API level of this Node.js. */
  napi: number
  /** Version of glibc; `undefined` where the C library is another one. */
  glibc: string | undefined
}

const NAPI_NEEDED = 9

/** The environment of this process. */
export function loadEnvironment(): LoadEnvironment {
  return {
    platform: `${process.platform}-${process.arch}`,
    node: process.versions.node,
    napi: Number(process.versions.napi),
    glibc: glibcVersion(),
  }
}

/** Version of the glibc that runs this process; `undefined` on musl and outside Linux. */
export function glibcVersion(): string | undefined {
  if (process.platform !== 'linux') return undefined
  const report = process.report.getReport() as { header?: { glibcVersionRuntime?: string } }
  return report.header?.glibcVersionRuntime
}

/**
 * Turns what the generated loader threw into a diagnosis. The loader tries several files and chains the failures
 * through `cause`; its own message blames npm whatever the reason was.
 */
export function explainLoadFailure(error: unknown, environment: LoadEnvironment): KintsugiError {
  const tried = causeChain(error)
  const all = tried.join('\n')
  const { platform, node, napi, glibc } = environment
  const where = `the native addon of kintsugi could not be loaded on ${platform}, Node.js ${node}`
  const fail = (reason: string, hint: string): KintsugiError =>
    new KintsugiError({ code: 'ERR_ADDON_LOAD', message: `${where}: ${reason}`, subject: platform, hint, cause: error })

  if (napi < NAPI_NEEDED) {
    return fail(
      `it needs Node-API ${NAPI_NEEDED} and this Node.js has ${napi}`,
      'Use Node.js 20.19, 22.12, 24 or later.',
    )
  }
  if (all.includes('ERR_DLOPEN_DISABLED') || all.includes('addons is disabled')) {
    return fail('native addons are switched off', 'Start Node.js without --no-addons.')
  }
  const symbol = /GLIBC_(\d[\d.]*)['` ]* not found/.exec(all)
  if (symbol) {
    return fail(`it needs glibc ${symbol[1]} and this system has ${glibc ?? 'another C library'}`, BUILD_HINT)
  }
  if (/invalid ELF header|wrong ELF class|incompatible architecture|not a valid Win32 application/.test(all)) {
    return fail('the binary was built for another platform', REINSTALL_HINT)
  }
  if (/ld-musl|libc\.musl|Error relocating/.test(all)) {
    return fail('the binary was built for another C library', BUILD_HINT)
  }
  const broken = tried.find((line) => !/cannot find (module|native binding)/i.test(line))
  if (broken) return fail(broken, REINSTALL_HINT)
  const looked = [...new Set(all.match(/(?<=Cannot find module ')[^']+/g) ?? [])]
  return fail(
    looked.length > 0 ? `there is no binary for it (looked for ${looked.join(', ')})` : 'there is no binary for it',
    BUILD_HINT,
  )
}

const BUILD_HINT =
  'Build it from a clone of the repository with `npm run build`, which needs rustup (https://rustup.rs) and a C compiler.'

const REINSTALL_HINT =
  'Delete node_modules and install again on this machine: a folder that was copied from another machine has its binary.'

/** First line of the message of `error` and of each of its causes, with the code where there is one. */
function causeChain(error: unknown): string[] {
  const lines: string[] = []
  for (let depth = 0; error instanceof Error && depth < 32; depth++) {
    const { code } = error as NodeJS.ErrnoException
    const [line = ''] = error.message.split('\n')
    lines.push(code && !line.includes(code) ? `${line} (${code})` : line)
    error = error.cause
  }
  return lines
}
