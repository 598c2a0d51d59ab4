import { abortedSignal, followSignals } from './abort.js'
import { fromNative } from './errors.js'

/** Where a job stands. */
export interface Progress {
  /** What it is doing: `calibrate`, `compress`, `write`, … */
  phase: string
  /** Units of work finished. */
  done: number
  /** Units of work in all; 0 while it is not known. */
  total: number
  /** What is being worked on, e.g. `model.layers.3`. */
  unit: string
  /** Estimate from the pace so far; absent before the first unit is done. */
  secondsLeft?: number
}

/** How a job looks at, and stops, the work behind it. */
export interface JobControl {
  cancel(): void
  progress(): Progress
}

/** Work that runs: its control and its outcome. */
export interface RunningWork<T> {
  control: JobControl
  result: Promise<T>
}

const POLL_MILLISECONDS = 100

/**
 * A long call. Await it for its result; meanwhile iterate over `progress()`, or end it with `cancel()` or the
 * `AbortSignal` that was given to the call.
 *
 * A cancelled job rejects once the work has stopped and cleaned up: with `ERR_CANCELLED` after `cancel()`, with
 * `signal.reason` after an abort. Work that finishes before it notices keeps its result.
 */
export class Job<T> implements Promise<T> {
  readonly [Symbol.toStringTag] = 'Job'
  readonly #result: Promise<T>
  #control: JobControl | undefined
  #settled = false

  /**
   * Runs `start` at once, unless one of `signals` has aborted. What `start` throws, the job rejects with.
   * @internal
   */
  constructor(start: () => RunningWork<T>, signals: readonly (AbortSignal | undefined)[] = []) {
    this.#result = this.#run(start, signals)
  }

  async #run(start: () => RunningWork<T>, signals: readonly (AbortSignal | undefined)[]): Promise<T> {
    let aborted = abortedSignal(signals)
    let unfollow = (): void => {}
    try {
      if (aborted) throw aborted.reason
      const { control, result } = start()
      this.#control = control
      unfollow = followSignals(signals, (signal) => {
        aborted = signal
        control.cancel()
      })
      return await result
    } catch (error) {
      if (aborted && !this.#control) throw aborted.reason
      const failure = fromNative(error)
      throw aborted && failure.code === 'ERR_CANCELLED' ? aborted.reason : failure
    } finally {
      unfollow()
      this.#settled = true
    }
  }

  /**
   * Readings of the progress: one now, one after each change, one at the end. The iteration ends when the job
   * settles, whatever its outcome; the outcome itself comes from awaiting the job. The polling alone keeps no
   * process alive.
   */
  async *progress(): AsyncGenerator<Progress, void, undefined> {
    let wake = (): void => {}
    void this.#result.then(
      () => wake(),
      () => wake(),
    )
    let last = ''
    for (;;) {
      const ended = this.#settled
      const reading = this.#control?.progress()
      if (reading) {
        const { secondsLeft: _, ...position } = reading
        const key = JSON.stringify(position)
        if (key !== last) {
          last = key
          yield reading
        }
      }
      if (ended) return
      if (this.#settled) continue
      await new Promise<void>((resolve) => {
        const timer = setTimeout(resolve, POLL_MILLISECONDS)
        timer.unref()
        wake = () => {
          clearTimeout(timer)
          resolve()
        }
      })
    }
  }

  /** Asks the work to stop. It may still finish; await the job to know. */
  cancel(): void {
    this.#control?.cancel()
  }

  then<A = T, B = never>(
    onfulfilled?: ((value: T) => A | PromiseLike<A>) | null,
    onrejected?: ((reason: unknown) => B | PromiseLike<B>) | null,
  ): Promise<A | B> {
    return this.#result.then(onfulfilled, onrejected)
  }

  catch<B = never>(onrejected?: ((reason: unknown) => B | PromiseLike<B>) | null): Promise<T | B> {
    return this.#result.catch(onrejected)
  }

  finally(onfinally?: (() => void) | null): Promise<T> {
    return this.#result.finally(onfinally)
  }
}
