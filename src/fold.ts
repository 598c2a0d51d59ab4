import { type Checkpoint, folderOf } from './checkpoint.js'
import { Job } from './job.js'
import { native } from './native.js'
import { abortSignal, checkOptions, number, oneOf, optional, signalOf, text, withDefault } from './options.js'

/** How an adapter is added to the weights of its base model. */
export interface FoldOptions {
  /** Folder to write. It must not exist, or be empty. */
  out: string
  /**
   * What the update is multiplied with, beside the scaling of the adapter; default 1. Of a module that the adapter
   * holds whole the update is its difference from that of the base.
   */
  weight?: number
  /** Number type of the weights that are written; `auto` (the default) leaves each in its own. */
  elementType?: 'auto' | 'bf16' | 'f16' | 'f32'
  /** Aborting it cancels the job. */
  signal?: AbortSignal
}

/** What was done. */
export interface FoldReport {
  recipe: { checkpoint: string; adapter: string; weight: number; out: string; elementType: string | null }
  /** Weights to which factors were added. */
  modules: number
  /** Tensors that the adapter holds whole (`modules_to_save`) and that took the place of those of the base. */
  wholeTensors: number
  /** Bytes of the folder. */
  bytes: number
  seconds: number
  /** Largest resident set of the process so far; `null` where the system does not tell. */
  peakMemoryBytes: number | null
}

const schema = {
  out: text,
  weight: withDefault(number({ min: -Number.MAX_VALUE }), 1),
  elementType: withDefault(oneOf(['auto', 'bf16', 'f16', 'f32']), 'auto'),
  signal: optional(abortSignal),
}

/**
 * Adds a LoRA adapter to the weights of its base model and writes the sum as a Hugging Face folder, tensor by tensor.
 * Modules that the adapter holds whole (`modules_to_save`) take the place of those of the base. The folder appears whole
 * or not at all.
 */
export function fold(source: string | Checkpoint, adapter: string, options: FoldOptions): Job<FoldReport> {
  return new Job(() => {
    const checkpoint = folderOf(source, 'source')
    const folder = text(adapter, 'adapter')
    const { signal: _, ...given } = checkOptions(options, schema)
    const control = new (native().BindingControl)()
    const result = native().fold({ ...given, checkpoint, adapter: folder }, control) as Promise<FoldReport>
    return { control, result }
  }, [signalOf(options)])
}
