import { fromNative } from './errors.js'
import { native } from './native.js'
import { text } from './options.js'

/** What a checkpoint is, read from its headers alone. An architecture that is not supported is an answer, not an error. */
export interface CheckpointInfo {
  path: string
  /** As `config.json` names it, e.g. `LlamaForCausalLM`; `null` when it names none. */
  architecture: string | null
  /** Weights of the original model; `null` when the architecture is not supported, like the other sizes below. */
  parameters: number | null
  /** Number of tensors. */
  tensors: number
  /** Bytes of all tensors. */
  bytes: number
  /** Bytes by number type, e.g. `{ bf16: 14688768 }`. */
  dtypes: Record<string, number>
  /** Linears of the decoder blocks. */
  linears: number | null
  /**
   * `null` for a checkpoint that is not compressed; `groupSize` is `null` for one group per row. Of a GGUF file the type
   * of most weights; `dtypes` has them all.
   */
  quantization: null | { format: string; bits: number; groupSize: number | null; symmetric: boolean }
  /** Bits of codes, scales, zero points and factors, or of the plain weights, over the weights of the Linears. */
  bitsPerWeight: number | null
  /** The PEFT folder `eora/` inside the checkpoint; `null` without. */
  compensation: null | { linears: number; smallestRank: number; largestRank: number }
  /** Sizes of the decoder. */
  spec: null | DecoderSizes
  /** Whether `compress` takes it. */
  canCompress: boolean
  /** Whether `loadModel` takes it. */
  canRun: boolean
  /** Why not, where one of the two is false. */
  reason: string | null
  /** What the folder says wrongly and was read otherwise, e.g. a wrong version of the GPTQ format; normally empty. */
  notices: string[]
}

/** Sizes of a decoder. */
export interface DecoderSizes {
  layers: number
  hiddenSize: number
  intermediateSize: number
  heads: number
  kvHeads: number
  headDim: number
  vocabularySize: number
  contextLength: number
  tiedHead: boolean
}

/** A folder of weights in Hugging Face layout, what `compress` made of one, or a GGUF file. */
export class Checkpoint {
  /** What it is. */
  readonly info: CheckpointInfo

  private constructor(info: CheckpointInfo) {
    this.info = info
  }

  /**
   * Reads and checks the headers of the checkpoint in the folder or GGUF file `path`; no weights.
   *
   * @throws KintsugiError `ERR_CHECKPOINT_NOT_FOUND`, `ERR_CHECKPOINT_SHARD_MISSING`, `ERR_CHECKPOINT_CORRUPT`,
   * `ERR_CONFIG_INVALID`
   */
  static async open(path: string): Promise<Checkpoint> {
    const folder = text(path, 'path')
    try {
      return new Checkpoint((await native().inspect(folder)) as CheckpointInfo)
    } catch (error) {
      throw fromNative(error)
    }
  }

  /** The folder or file. */
  get path(): string {
    return this.info.path
  }
}

/** The folder of `source`, which is a path or an open checkpoint. */
export function folderOf(source: string | Checkpoint, name: string): string {
  return source instanceof Checkpoint ? source.path : text(source, name)
}
