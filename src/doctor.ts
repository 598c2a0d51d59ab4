import { fromNative } from './errors.js'
import { glibcVersion } from './load-failure.js'
import { native } from './native.js'
import { packageVersion } from './package-version.js'

/** What this machine, this Node.js and this build can do. */
export interface DoctorReport {
  /** Version of this package. */
  version: string
  node: string
  /** `process.platform`, `-`, `process.arch`. */
  platform: string
  /** `null` where the C library is another one. */
  glibc: string | null
  cpu: {
    /** Level that products use: the best, or the one that `KINTSUGI_CPU` forces. */
    selected: string
    best: string
    /** Levels that this CPU can run. */
    levels: string[]
    /** Optional features beyond the level. */
    features: string[]
  }
  /** Threads of the shared pool. */
  threads: number
  /** Kernels of every level against the f64 reference. */
  selfCheck: SelfCheck[]
}

/** One case of the self-check. */
export interface SelfCheck {
  case: string
  level: string
  precision: string
  /** Largest error against the reference. */
  error: number
  /** Largest error that passes. */
  budget: number
  ok: boolean
}

/** Looks at this machine and checks the kernels on it. */
export async function doctor(): Promise<DoctorReport> {
  try {
    const report = (await native().doctor()) as Omit<DoctorReport, 'node' | 'platform' | 'glibc'>
    return {
      ...report,
      version: packageVersion(),
      node: process.versions.node,
      platform: `${process.platform}-${process.arch}`,
      glibc: glibcVersion() ?? null,
    }
  } catch (error) {
    throw fromNative(error)
  }
}
