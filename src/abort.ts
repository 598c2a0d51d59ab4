/**
 * Calls `onAbort` with the first of `signals` that aborts. Returns a function that stops listening; a
 * call that is over must use it, because a signal may outlive thousands of calls.
 */
export function followSignals(
  signals: readonly (AbortSignal | undefined)[],
  onAbort: (signal: AbortSignal) => void,
): () => void {
  const unfollow: (() => void)[] = []
  const stop = (): void => {
    for (const remove of unfollow) remove()
    unfollow.length = 0
  }
  for (const signal of signals) {
    if (!signal) continue
    const listener = (): void => {
      stop()
      onAbort(signal)
    }
    signal.addEventListener('abort', listener, { once: true })
    unfollow.push(() => signal.removeEventListener('abort', listener))
  }
  return stop
}

/** The first of `signals` that has aborted already. */
export function abortedSignal(signals: readonly (AbortSignal | undefined)[]): AbortSignal | undefined {
  return signals.find((signal) => signal?.aborted)
}
