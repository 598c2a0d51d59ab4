export { Checkpoint, type CheckpointInfo, type DecoderSizes } from './checkpoint.js'
export {
  type CalibrationKind,
  type CalibrationOptions,
  type CalibrationShare,
  type CalibrationSourceOptions,
  type RecipeCalibration,
  type RecipeCalibrationSource,
} from './calibration.js'
export {
  compensate,
  type CompensateOptions,
  type CompensateRecipe,
  type CompensationPlan,
  type CompensationReport,
  type PlannedCompensation,
} from './compensate.js'
export {
  type Arithmetic,
  type Backend,
  compress,
  type CompressedGguf,
  type CompressedLinear,
  type CompressOptions,
  type CompressReport,
  type CompressSummary,
  type DiskPlan,
  type GroupAxis,
  type LinearFormat,
  type LinearOverride,
  type MemoryPlan,
  type Plan,
  type PlannedLinear,
  type Precision,
  type Recipe,
} from './compress.js'
export { type ConversionReport, convert, type ConvertedLinear, type ConvertOptions, type GgufType } from './convert.js'
export { doctor, type DoctorReport, type SelfCheck } from './doctor.js'
export {
  type AblatedGroup,
  type Certificate,
  type CompensationSummary,
  type DenseError,
  type EoraInputs,
  type EoraOptions,
  type EoraRecipe,
  type EoraSolver,
  type HoldOutError,
  type RankAblation,
  type RankAllocation,
  type RankWeights,
} from './eora.js'
export { ERROR_CODES, type ErrorCode, KintsugiError } from './errors.js'
export { fold, type FoldOptions, type FoldReport } from './fold.js'
export { Generation, type GenerationSummary, type Piece } from './generation.js'
export { Job, type Progress } from './job.js'
export {
  type CeilingSpeed,
  type MeasuredWeights,
  measureSpeed,
  type MeasureSpeedOptions,
  type ModelSpeed,
  type ProductSpeed,
  type SpeedReport,
  type Spread,
} from './machine-speed.js'
export {
  type AdapterShare,
  type ElementCoordinates,
  merge,
  type MergedModule,
  type MergeMethod,
  type MergeOptions,
  type MergePlan,
  type MergeRecipe,
  type MergeReport,
  type MergeSummary,
  type MetricWeightOptions,
  metricWeights,
  type ModuleKept,
  type PlannedMerge,
  remerge,
  type RemergeOptions,
} from './merge.js'
export {
  type DivergenceReport,
  type GenerateOptions,
  loadModel,
  type LoadOptions,
  Model,
  type ModelInfo,
  type PerplexityOptions,
  type PerplexityReport,
} from './model.js'
export { QuantizedLinear, type QuantizedLinearInfo, type QuantizedLinearOptions } from './quantized-linear.js'
