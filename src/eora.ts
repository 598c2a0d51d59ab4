import { KintsugiError } from './errors.js'
import type { BindingEora } from './native.js'
import { boolean, integer, number, object, oneOf, optional, withDefault, withoutUndefined } from './options.js'

/** How the compensation is solved. */
export interface EoraOptions {
  /**
   * Rank of the factors of every Linear. Where a budget is divided (`meanRank`, `budgetBytes`) the largest rank of one,
   * by default four times the mean, or 256.
   */
  rank?: number
  /**
   * How the directions are chosen. `fast`, the default: the best ones for the inputs, by an iteration whose residuals
   * say so; `exact`: the same completely; `diagonal`: as if channels were uncorrelated, with the exponent of their energies (of three,
   * one of which is `lorc`) that leaves least, for very few calibration tokens; `lorc`: as if all inputs were alike, a
   * baseline.
   */
  solver?: EoraSolver
  /** Bits of a value of the factors, default 16 (bf16). With 8 or 4 they are codes with scales. */
  factorBits?: 16 | 8 | 4
  /**
   * Which inputs it is solved for. `deployed`, the default: those that Linears read behind compressed and compensated
   * blocks; `dense`: those of the original model, whose blocks alone run (a compression is solved for them, too); `mixed`:
   * deployed inputs, with the outputs of the original model on its own inputs as the target, so that a Linear repairs
   * what those before it have left. `mixed` runs both models and cannot start from saved statistics.
   */
  inputs?: EoraInputs
  /**
   * With `mixed`: how much of the difference of both inputs is corrected, 0 to 1, default 0.5. All of it follows chance in
   * the calibration; 0 is `deployed`, with errors against the outputs of the original model in the report.
   */
  mismatch?: number
  /**
   * Also a bias for each Linear: what the factors leave of the mean of its inputs, default false. Never worse on the
   * calibration inputs than the same rank without, for `fast` and `exact`; costs 32 bits per output. peft loads it
   * (`lora_bias`), vLLM does not.
   */
  affine?: boolean
  /**
   * Whether query, key and value, and gate and up, share an A each, default false: one compensation is solved for all
   * Linears that read one input, with ranks to choose from for the bytes of the As that are saved, and run time
   * multiplies once with A. `rank` and budgets then count such a group as one. Errors count relative to the outputs of each
   * Linear (by powers of two), or as they are with `rankWeights: 'equal'`.
   */
  grouped?: boolean
  /** Ranks that differ: as many bytes as this rank in every Linear takes, divided where they remove most error. */
  meanRank?: number
  /** In place of `meanRank`: bytes of all factors together. */
  budgetBytes?: number
  /** With a budget: least rank of a Linear, default 0. */
  minRank?: number
  /** With a budget: what ranks are multiples of, default 8. */
  rankMultiple?: number
  /**
   * With a budget: what counts. `outputs`, the default: errors relative to the outputs of each Linear; `equal`: errors as
   * they are; `ablation`: relative ones times weights that are fitted to what leaving out the factors of each type of
   * Linear, and of each of four bands of blocks, does to the predictions of the model. It needs a text, not statistics.
   */
  rankWeights?: RankWeights
}

/** What errors of Linears count when a budget of ranks is divided. */
export type RankWeights = 'outputs' | 'equal' | 'ablation'

/** A way to choose the directions of a compensation. */
export type EoraSolver = 'fast' | 'exact' | 'diagonal' | 'lorc'

/** Inputs that a compensation is solved for. */
export type EoraInputs = 'deployed' | 'dense' | 'mixed'

/** {@link EoraOptions} with every default filled in. */
export interface EoraRecipe {
  rank: number
  solver: EoraSolver
  factorBits: 16 | 8 | 4
  inputs: EoraInputs
  /** Of `mixed` inputs. */
  mismatch?: number
  /** Only there when it is asked for. */
  affine?: true
  /** Only there when it is asked for. */
  grouped?: true
  /** `null` for one rank. */
  allocation: null | {
    budget: { meanRank: number } | { bytes: number }
    minRank: number
    multiple: number
    weights: RankWeights
  }
}

/** Relative output errors on inputs that took no part in the calibration. */
export interface HoldOutError {
  /** Number of inputs. */
  tokens: number
  quantized: number
  compensated: number
}

/** Errors against the outputs of the original model on its own inputs: `‖WX − ·X̂‖ / ‖WX‖`. */
export interface DenseError {
  quantized: number
  compensated: number
  /** On inputs that took no part in the calibration; `null` without such inputs. */
  holdOut: null | HoldOutError
}

/** Whether a compensation is as good as any of its rank: measured on its directions, against an estimate of the bound. */
export interface Certificate {
  /** Relative output error before the factors are rounded. */
  solved: number
  /** No factors of that rank leave less. */
  bound: number
  /** Whether `solved` is within a thousandth of the bound, up to 1e-7 of what there was to repair. */
  holds: boolean
}

/** All compensations of a model. */
export interface CompensationSummary {
  meanRank: number
  /** The largest quotient of an error and its bound; `null` where no bound is above zero. */
  worstRatio: number | null
  /** Linears whose certificate holds. */
  certified: number
  /** Linears whose solver promises the best directions and whose certificate does not hold. */
  uncertified: number
  /** Means over the Linears on inputs that took no part in the calibration; `null` without such inputs. */
  holdOut: null | { quantized: number; compensated: number }
  /**
   * The same against the outputs of the original model, or on the calibration inputs where none were held out; `null`
   * unless the compensation was solved for `mixed` inputs.
   */
  denseError: null | { quantized: number; compensated: number }
  /** How a budget of ranks was divided; `null` for one rank. */
  allocation: null | RankAllocation
}

/** How a budget of ranks was divided, and what that is worth. */
export interface RankAllocation {
  /** `uniform` where ranks that differ were no better on inputs that took no part. */
  chosen: 'allocated' | 'uniform'
  /** The one rank that takes no more than the budget. */
  uniformRank: number
  meanRank: number
  /** Bytes of all factors as they are stored, an A that Linears share once. */
  bytes: number
  /** Whether errors are measured on inputs that took no part; else on the calibration inputs. */
  heldOut: boolean
  /** Weighted relative error with one rank, on inputs that did not decide either. */
  uniform: number
  /** The same with the ranks that were divided. */
  allocated: number
  /** What the weights were made of; only there with `rankWeights: 'ablation'`. */
  ablation?: RankAblation
}

/** What ablations say about the worth of factors, and what weights of energies were made of it. */
export interface RankAblation {
  /** Whether weights were fitted; else there was nothing to learn, and they are those of `outputs`. */
  fitted: boolean
  /** Tokens whose predictions were compared. */
  tokens: number
  /** Whether they took no part in the calibration. */
  heldOut: boolean
  /** The types of Linears. */
  types: AblatedGroup[]
  /** Blocks that follow each other. */
  bands: AblatedGroup[]
}

/** Linears that lost their factors together. */
export interface AblatedGroup {
  /** What their names have in common; `*` stands for any number. */
  name: string
  /** Energy that their factors remove, relative to the outputs of each Linear: the sum. */
  removed: number
  /** Mean `KL(P ‖ Q)` in nats of the predictions Q without these factors from those with all. */
  cost: number
  /** The weight of a Linear is the product of the factors of its type and of its band; 1 is the mean. */
  factor: number
}

/** Checks {@link EoraOptions}. */
export const eoraSchema = object({
  rank: optional(integer({ min: 1, max: 2 ** 16 })),
  solver: withDefault(oneOf(['fast', 'exact', 'diagonal', 'lorc']), 'fast'),
  factorBits: withDefault(oneOf([16, 8, 4]), 16),
  inputs: withDefault(oneOf(['deployed', 'dense', 'mixed']), 'deployed'),
  mismatch: optional(number({ min: 0, max: 1 })),
  affine: withDefault(boolean, false),
  grouped: withDefault(boolean, false),
  meanRank: optional(number({ min: 1, max: 2 ** 16 })),
  budgetBytes: optional(integer({ min: 1 })),
  minRank: optional(integer({ min: 0, max: 2 ** 16 })),
  rankMultiple: optional(integer({ min: 1, max: 2 ** 16 })),
  rankWeights: optional(oneOf(['outputs', 'equal', 'ablation'])),
})

/** What the addon takes for a compensation. */
export function eoraRequest(eora: ReturnType<typeof eoraSchema>): BindingEora {
  const { rank, meanRank, budgetBytes } = eora
  if (meanRank !== undefined && budgetBytes !== undefined) {
    throw new KintsugiError({
      code: 'ERR_OPTION_INVALID',
      message: 'a mean rank and a budget of bytes exclude each other',
      subject: 'eora.budgetBytes',
      hint: 'Give one of both.',
    })
  }
  if (eora.inputs !== 'mixed' && eora.mismatch !== undefined) {
    throw new KintsugiError({
      code: 'ERR_OPTION_INVALID',
      message: `there is no mismatch to correct with ${eora.inputs} inputs`,
      subject: 'eora.mismatch',
      hint: "Use inputs 'mixed', or leave it out.",
    })
  }
  const budgeted = meanRank !== undefined || budgetBytes !== undefined
  const idle = (['minRank', 'rankMultiple', 'rankWeights'] as const).find((name) => eora[name] !== undefined)
  if (!budgeted && idle !== undefined) {
    throw new KintsugiError({
      code: 'ERR_OPTION_INVALID',
      message: `${idle} says how a budget is divided, and there is none`,
      subject: `eora.${idle}`,
      hint: 'Give meanRank or budgetBytes, or leave it out.',
    })
  }
  const usual = meanRank === undefined ? budgetBytes && 256 : Math.min(Math.ceil(4 * meanRank), 2 ** 16)
  if (rank === undefined && usual === undefined) {
    throw new KintsugiError({
      code: 'ERR_OPTION_INVALID',
      message: 'a compensation needs a rank',
      subject: 'eora.rank',
      hint: 'Give rank, such as 32 or 64, or a budget: meanRank or budgetBytes.',
    })
  }
  const division = { minRank: 0, rankMultiple: 8, rankWeights: 'outputs' }
  return { ...division, ...withoutUndefined({ ...eora, rank: rank ?? usual! }) }
}
