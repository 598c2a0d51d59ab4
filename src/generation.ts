import { abortedSignal, followSignals } from './abort.js'
import { fromNative } from './errors.js'

/** What one step of a generation adds. */
export interface Piece {
  /** Complete characters only; empty while a character or a possible stop string is held back. */
  text: string
  /** The token that was generated. */
  token: number
}

/** What a generation was. */
export interface GenerationSummary {
  promptTokens: number
  /** Tokens generated. */
  tokens: number
  /** `length`: `maxTokens` or the context was reached; `stop`: a stop string appeared; `eos`: the model ended. */
  finishReason: 'length' | 'stop' | 'eos'
  /** Seconds spent on the prompt. */
  secondsPrefill: number
  /** Seconds spent on the tokens after it. */
  secondsDecode: number
}

/** The native side of a generation. */
export interface GenerationSource {
  /** The next piece; `null` at the end. */
  next(): Promise<Piece | null>
  summary(): Promise<GenerationSummary>
  cancel(): void
}

/**
 * A text in the making: iterate over its pieces. A token is computed when it is asked for. Leaving the loop, or an
 * abort, ends the generation.
 */
export class Generation implements AsyncIterableIterator<Piece, undefined> {
  readonly #source: GenerationSource
  readonly #signals: readonly (AbortSignal | undefined)[]
  #last: Promise<unknown> = Promise.resolve()
  #summary: GenerationSummary | undefined
  #ended = false

  /** @internal */
  constructor(source: GenerationSource, signals: readonly (AbortSignal | undefined)[]) {
    this.#source = source
    this.#signals = signals
  }

  /** What the generation was; `undefined` until it has come to its end. */
  get summary(): GenerationSummary | undefined {
    return this.#summary
  }

  /** The next piece. Calls that overlap are answered in their order. */
  next(): Promise<IteratorResult<Piece, undefined>> {
    const step = this.#last.then(() => this.#step())
    this.#last = step.catch(() => {})
    return step
  }

  /** Ends the generation. */
  async return(): Promise<IteratorResult<Piece, undefined>> {
    this.#ended = true
    this.#source.cancel()
    await this.#last
    return { done: true, value: undefined }
  }

  /** All pieces from here on, joined. */
  async text(): Promise<string> {
    let text = ''
    for await (const piece of this) text += piece.text
    return text
  }

  [Symbol.asyncIterator](): this {
    return this
  }

  async #step(): Promise<IteratorResult<Piece, undefined>> {
    if (this.#ended) return { done: true, value: undefined }
    let aborted = abortedSignal(this.#signals)
    const unfollow = followSignals(this.#signals, (signal) => {
      aborted = signal
      this.#source.cancel()
    })
    try {
      if (aborted) throw aborted.reason
      const piece = await this.#source.next()
      if (piece) return { done: false, value: piece }
      this.#ended = true
      this.#summary = await this.#source.summary()
      return { done: true, value: undefined }
    } catch (error) {
      const cancelledByReturn = this.#ended
      this.#ended = true
      this.#source.cancel()
      if (cancelledByReturn) return { done: true, value: undefined }
      if (aborted) throw aborted.reason
      throw fromNative(error)
    } finally {
      unfollow()
    }
  }
}
