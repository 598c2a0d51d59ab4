import { join } from 'node:path'
import { fileURLToPath } from 'node:url'

import { Checkpoint, compress, type CompressOptions, convert, type ErrorCode, fold, loadModel, merge } from 'kintsugi'

import { SOUND } from './forge.js'

/** What models are asked to go on with: words of the sound tokenizer. */
const PROMPT = 't1 t2 t3'
/** A text of such words. */
const WORDS = fileURLToPath(new URL('words.txt', import.meta.url))

/** The calls through which files of others come in. All get a folder with `source/` or `adapter/` in it. */
export const DOORS = {
  open: async (folder: string) => {
    await Checkpoint.open(join(folder, 'source'))
  },
  load: async (folder: string, prompt = PROMPT) => {
    using model = await loadModel(join(folder, 'source'))
    for await (const _ of model.generate(prompt, { maxTokens: 2, temperature: 0 })) continue
  },
  compress: async (folder: string) => {
    await compress(join(folder, 'source'), COMPRESS(folder))
  },
  convert: async (folder: string) => {
    await convert(join(folder, 'source'), { out: join(folder, 'out'), format: 'gptq_v2', allowRequantize: true })
  },
  adapter: async (folder: string) => {
    using _ = await loadModel(SOUND, { adapters: { a: join(folder, 'adapter') } })
  },
  merge: async (folder: string) => {
    await merge([join(folder, 'adapter')], { out: join(folder, 'out'), method: 'cat' })
  },
  fold: async (folder: string) => {
    await fold(SOUND, join(folder, 'adapter'), { out: join(folder, 'out') })
  },
} satisfies Record<string, (folder: string, prompt?: string) => Promise<void>>

export type Door = keyof typeof DOORS

/** How `compress` is called, for attacks that prepare what an interrupted job left. */
export function COMPRESS(folder: string): CompressOptions {
  const calibration = { text: WORDS, sequences: 2, length: 32 }
  return { out: join(folder, 'out'), method: 'rtn', bits: 4, groupSize: 32, calibration }
}

export const CHECKPOINT: readonly Door[] = ['open', 'load', 'compress']
export const ADAPTER: readonly Door[] = ['adapter', 'merge', 'fold']

/** A trick that a hostile, broken or careless file can play. */
export interface Attack {
  /** One sentence. */
  trick: string
  /** Writes the files into an empty folder: `source/`, a checkpoint, or `adapter/`, a PEFT folder. */
  make(folder: string): void
  /** The calls that it is tried on. */
  doors: readonly Door[]
  /** What all of them say; `null` where the file is odd but sound, and must work. */
  code: ErrorCode | null
  /** What the error names. */
  subject?: RegExp
  /** What models are asked to go on with, for attacks on texts. */
  prompt?: string
  /** Needs pipes, links or devices. */
  unix?: boolean
}
