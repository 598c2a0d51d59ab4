//! The long jobs: walk a checkpoint block by block, calibrate, compress, compensate, write, report; merge adapters
//! module by module.
//!
//! Bounded memory: the weights of one decoder block and the calibration activations are all that is held.

mod block_compressor;
mod calibration_stream;
mod calibration_text;
mod compression;
mod conversion;
mod factor_spill;
mod folding;
mod inspection;
mod ledger;
mod linear_override;
mod merging;
mod output_format;
mod plan;
mod recipe;
mod report;
mod scale_folding;

pub use block_compressor::{BlockCompressor, CompressedBlock};
pub use calibration_stream::CalibrationStream;
pub use calibration_text::CalibrationText;
pub use compression::{compress, plan};
pub use conversion::{ConversionReport, ConvertRecipe, ConvertedLinear, convert};
pub use folding::{FoldRecipe, FoldReport, fold_adapter};
pub use inspection::{Inspection, inspect};
pub use linear_override::LinearOverride;
pub use merging::{
    AdapterShare, MergePlan, MergeRecipe, MergeReport, MergeSummary, ModuleMergeReport, PlannedMerge, RankPadding,
    VLLM_RANKS, merge_adapters, plan_merge,
};
pub use plan::{Plan, PlannedLinear};
pub use recipe::{CalibrationRecipe, EoraRecipe, Recipe};
pub use report::{LinearReport, MeanError, PhaseSeconds, Report, Summary};
