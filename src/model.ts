import { type Checkpoint, folderOf } from './checkpoint.js'
import type { Arithmetic, Backend, Precision } from './compress.js'
import { fromNative, KintsugiError } from './errors.js'
import { Generation, type GenerationSource, type GenerationSummary } from './generation.js'
import { Job, type RunningWork } from './job.js'
import { type BindingModel, native } from './native.js'
import {
  abortSignal,
  boolean,
  checkOptions,
  integer,
  number,
  oneOf,
  optional,
  signalOf,
  string,
  text,
  texts,
  textsByName,
  withDefault,
  withoutUndefined,
} from './options.js'

/** How a checkpoint is loaded. */
export interface LoadOptions {
  /** Arithmetic, default `exact`. */
  precision?: Precision
  /** What runs it, default `cpu`. */
  backend?: Backend
  /**
   * Use the compensation `eora/` of a compressed checkpoint; default true. A path names another folder with factors, as
   * `compensate` writes them, to be used beside `eora/`.
   */
  compensation?: boolean | string
  /** Of each compensation no more than this many directions: a part of one is a compensation of less rank. */
  eoraRank?: number
  /** PEFT folders by the name that requests use. */
  adapters?: Record<string, string>
  /** Aborting it cancels loading. */
  signal?: AbortSignal
}

/** What was loaded. */
export interface ModelInfo {
  architecture: string
  layers: number
  hiddenSize: number
  vocabularySize: number
  contextLength: number
  /** Weights of the Linears. */
  linearParameters: number
  /** Bytes that the weights take in memory. */
  memoryBytes: number
  precision: Precision
  /**
   * How many Linears, the head, routers and gates of shared experts among them, are multiplied in which arithmetic:
   * `f32`, `bf16` or `int8`.
   */
  arithmetic: Partial<Record<Arithmetic, number>>
  backend: Backend
  /** Instruction set of the kernels. */
  cpuLevel: string
  /** Names of the loaded adapters. */
  adapters: string[]
}

/** How a text is continued. */
export interface GenerateOptions {
  /** Most tokens to generate, default 128. */
  maxTokens?: number
  /** 0 (the default) takes the most likely token every time. */
  temperature?: number
  /** Only the `topK` most likely tokens; 0 (the default) for all. */
  topK?: number
  /** Only the most likely tokens that together reach this probability; default 1. */
  topP?: number
  /** Only tokens at least this likely, as a share of the most likely one; default 0. */
  minP?: number
  /** Divides the logits of tokens that have appeared; 1 (the default) for none. */
  repetitionPenalty?: number
  /** Makes sampling repeatable; random by default. */
  seed?: number
  /** Texts that end the generation and are not part of it. */
  stop?: string | string[]
  /** Name of a loaded adapter. */
  adapter?: string
  /** Go on after an end token; default false. */
  ignoreEos?: boolean
  /** Aborting it ends the generation. */
  signal?: AbortSignal
}

/** How perplexity is measured. */
export interface PerplexityOptions {
  /** Tokens of a window, default 512. */
  length?: number
  /** Name of a loaded adapter. */
  adapter?: string
  /** Aborting it cancels the measurement. */
  signal?: AbortSignal
}

/**
 * How well a model predicts a text: the text is tokenized as one string without special tokens and cut into windows
 * of `length` tokens without overlap, the last partial one dropped; every token after the first of its window is
 * predicted from those before it in the window.
 */
export interface PerplexityReport {
  /** `exp(meanNegativeLogLikelihood)`. */
  perplexity: number
  /** In nats, over all predicted tokens. */
  meanNegativeLogLikelihood: number
  /** Predicted tokens. */
  tokens: number
  windows: number
  /** Tokens of a window. */
  length: number
  secondsTotal: number
}

/**
 * How far the predictions of a model are from those of a reference, over the windows of {@link PerplexityReport}. The
 * divergence of a token is Σ p · ln(p / q) in nats, p by the reference.
 */
export interface DivergenceReport {
  meanKlDivergence: number
  /** 99 % of the tokens do not exceed it. */
  p99KlDivergence: number
  /** Share of tokens for which both find the same token most likely. */
  top1Agreement: number
  perplexity: number
  referencePerplexity: number
  /** Predicted tokens. */
  tokens: number
  windows: number
  /** Tokens of a window. */
  length: number
  secondsTotal: number
}

const loadSchema = {
  precision: withDefault(oneOf(['f32', 'exact', 'fast']), 'exact'),
  backend: withDefault(oneOf(['cpu', 'candle']), 'cpu'),
  compensation: withDefault(
    (value: unknown, name: string) => (typeof value === 'string' ? text(value, name) : boolean(value, name)),
    true,
  ),
  eoraRank: optional(integer({ min: 0, max: 2 ** 16 })),
  adapters: withDefault(textsByName, {}),
  signal: optional(abortSignal),
}

const generateSchema = {
  maxTokens: withDefault(integer({ min: 1, max: 2 ** 24 }), 128),
  temperature: withDefault(number({ min: 0, max: 100 }), 0),
  topK: withDefault(integer({ min: 0, max: 2 ** 24 }), 0),
  topP: withDefault(number({ min: 0, max: 1 }), 1),
  minP: withDefault(number({ min: 0, max: 1 }), 0),
  repetitionPenalty: withDefault(number({ min: 0.01, max: 100 }), 1),
  seed: optional(integer({ min: 0, max: 2 ** 32 - 1 })),
  stop: withDefault(
    (value: unknown, name: string) => (typeof value === 'string' ? [text(value, name)] : texts(value, name)),
    [],
  ),
  adapter: optional(text),
  ignoreEos: withDefault(boolean, false),
  signal: optional(abortSignal),
}

const perplexitySchema = {
  length: withDefault(integer({ min: 2, max: 2 ** 24 }), 512),
  adapter: optional(text),
  signal: optional(abortSignal),
}

/** Loads a checkpoint, compressed or not, for running. Dispose of the model when it is no longer needed. */
export function loadModel(source: string | Checkpoint, options: LoadOptions = {}): Job<Model> {
  return new Job(() => {
    const path = folderOf(source, 'source')
    const { signal: _, compensation, ...given } = checkOptions(options, loadSchema)
    const request = withoutUndefined({
      ...given,
      path,
      ownCompensation: compensation !== false,
      compensationFolder: typeof compensation === 'string' ? compensation : undefined,
    })
    const control = new (native().BindingControl)()
    const result = native()
      .loadModel(request, control)
      .then((binding) => new Model(binding))
    return { control, result }
  }, [signalOf(options)])
}

/** A model that runs. */
export class Model {
  readonly #binding: BindingModel
  /** Ends whatever still runs when the model is disposed of. */
  readonly #lifetime = new AbortController()
  readonly #running = new Set<Promise<unknown>>()

  /** @internal */
  constructor(binding: BindingModel) {
    this.#binding = binding
  }

  /** What was loaded. */
  get info(): ModelInfo {
    this.#assertAlive()
    return call(() => this.#binding.info() as ModelInfo)
  }

  /**
   * Continues `prompt`.
   *
   * @throws KintsugiError `ERR_OPTION_INVALID`, `ERR_OPTION_UNKNOWN`; the first piece may also fail with
   * `ERR_ADAPTER_UNKNOWN`, `ERR_CONTEXT_EXCEEDED` and `ERR_TEXT_TOO_SHORT`
   */
  generate(prompt: string, options: GenerateOptions = {}): Generation {
    this.#assertAlive()
    string(prompt, 'prompt')
    const { signal, ...given } = checkOptions(options, generateSchema)
    return call(() => {
      const control = new (native().BindingControl)()
      const generation = this.#binding.generate(prompt, withoutUndefined(given), control)
      const source: GenerationSource = {
        next: () => this.#track(generation.next()),
        summary: () => generation.summary() as Promise<GenerationSummary>,
        cancel: () => control.cancel(),
      }
      return new Generation(source, [signal, this.#lifetime.signal])
    })
  }

  /** Measures how well the model predicts `content`. */
  perplexity(content: string, options: PerplexityOptions = {}): Job<PerplexityReport> {
    return new Job((): RunningWork<PerplexityReport> => {
      this.#assertAlive()
      string(content, 'text')
      const { length, adapter } = checkOptions(options, perplexitySchema)
      const control = new (native().BindingControl)()
      const result = this.#binding.perplexity(content, length, adapter, control) as Promise<PerplexityReport>
      return { control, result: this.#track(result) }
    }, [signalOf(options), this.#lifetime.signal])
  }

  /**
   * Measures how far the predictions of this model are from those of `reference`, the model that it was made from.
   * Options apply to this model; the reference runs without adapter.
   */
  divergence(reference: Model, content: string, options: PerplexityOptions = {}): Job<DivergenceReport> {
    return new Job((): RunningWork<DivergenceReport> => {
      this.#assertAlive()
      reference.#assertAlive()
      string(content, 'text')
      const { length, adapter } = checkOptions(options, perplexitySchema)
      const control = new (native().BindingControl)()
      const result = this.#binding.divergence(reference.#binding, content, length, adapter, control)
      return { control, result: reference.#track(this.#track(result as Promise<DivergenceReport>)) }
    }, [signalOf(options), this.#lifetime.signal, reference.#lifetime.signal])
  }

  /** Frees the weights. Calls that still run are cancelled and fail with `ERR_DISPOSED`, as do later calls. */
  dispose(): void {
    if (this.#lifetime.signal.aborted) return
    this.#lifetime.abort(disposed())
    this.#binding.dispose()
  }

  [Symbol.dispose](): void {
    this.dispose()
  }

  /** Disposes of the model and waits for the calls that still ran. */
  async [Symbol.asyncDispose](): Promise<void> {
    this.dispose()
    await Promise.allSettled(this.#running)
  }

  #track<T>(work: Promise<T>): Promise<T> {
    this.#running.add(work)
    const remove = (): void => void this.#running.delete(work)
    work.then(remove, remove)
    return work
  }

  #assertAlive(): void {
    if (this.#lifetime.signal.aborted) throw disposed()
  }
}

function disposed(): KintsugiError {
  return new KintsugiError({
    code: 'ERR_DISPOSED',
    message: 'the model has been disposed of',
    subject: 'Model',
    hint: 'Load it again, or dispose of it later.',
  })
}

function call<T>(work: () => T): T {
  try {
    return work()
  } catch (error) {
    throw fromNative(error)
  }
}
