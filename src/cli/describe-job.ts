import type { CalibrationShare, CompensationSummary, CompressedLinear } from '../index.js'
import { formatShare } from './format.js'
import { formatTable } from './table.js'

const LARGEST_ERRORS_SHOWN = 5

/** Where the time went, the longest first: ` (calibrate 61 %, compress 30 %, write 9 %)`. */
export function describePhases(phases: Record<string, number>): string {
  const total = Object.values(phases).reduce((sum, seconds) => sum + seconds, 0)
  const shares = Object.entries(phases)
    .map(([phase, seconds]) => ({ phase, share: seconds / total }))
    .filter(({ share }) => share >= 0.005)
    .sort((a, b) => b.share - a.share)
  return shares.length > 0 ? ` (${shares.map(({ phase, share }) => `${phase} ${formatShare(share)}`).join(', ')})` : ''
}

/** Lines about the sources of a mixture; none for a single one. */
export function describeCalibration(sources: CalibrationShare[]): [string, string][] {
  if (sources.length < 2) return []
  return sources.map(({ file, tokens, weight, share }) => [
    `calibration ${file}`,
    `${tokens} tokens × ${weight}, ${formatShare(share)}`,
  ])
}

/** Lines about all compensations of a model. */
export function describeCompensation(summary: CompensationSummary | null): [string, string | undefined][] {
  if (summary === null) return []
  const { allocation, certified, uncertified, holdOut, denseError, worstRatio } = summary
  const proofs = certified + uncertified
  return [
    ['mean rank', allocation ? summary.meanRank.toFixed(1) : undefined],
    [
      'divided ranks',
      allocation
        ? `${formatShare(allocation.allocated)} instead of ${formatShare(allocation.uniform)} ` +
          `with rank ${allocation.uniformRank}${allocation.chosen === 'uniform' ? ', not taken' : ''}`
        : undefined,
    ],
    [
      'weights of ranks',
      allocation?.ablation
        ? `${allocation.ablation.fitted ? 'fitted to' : 'those of the outputs, nothing to learn from'} ablations on ` +
          `${allocation.ablation.tokens} ${allocation.ablation.heldOut ? 'held out ' : ''}tokens`
        : undefined,
    ],
    [
      'on held out tokens',
      holdOut ? `${formatShare(holdOut.quantized)} → ${formatShare(holdOut.compensated)} with factors` : undefined,
    ],
    [
      'against the original',
      denseError
        ? `${formatShare(denseError.quantized)} → ${formatShare(denseError.compensated)} with factors`
        : undefined,
    ],
    ['above the bound', worstRatio === null ? undefined : `${formatShare(worstRatio - 1)} at most`],
    ['certified', proofs > 0 ? `${certified} of ${proofs}` : undefined],
  ]
}

/** A table of the Linears with the largest errors; `undefined` when none has one. */
export function describeLargestErrors(linears: CompressedLinear[]): string | undefined {
  const worst = linears
    .flatMap(({ name, error }) => (error ? [{ name, error }] : []))
    .sort((a, b) => b.error.compensated - a.error.compensated)
    .slice(0, LARGEST_ERRORS_SHOWN)
  if (worst.length === 0) return undefined
  return formatTable(
    [
      { title: 'largest output errors' },
      { title: 'quantized', align: 'right' },
      { title: 'compensated', align: 'right' },
      { title: 'bound', align: 'right' },
    ],
    worst.map(({ name, error }) => [
      name,
      formatShare(error.quantized),
      formatShare(error.compensated),
      formatShare(error.bound),
    ]),
    process.stdout,
  )
}
