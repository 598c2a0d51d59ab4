//! The long jobs: walk a checkpoint block by block, calibrate, compress, compensate, write, report; merge adapters
//! module by module.
//!
//! Bounded memory: the weights of one decoder block, the statistics of its inputs and the calibration activations are
//! all that is held, and the activations go to disk where they do not fit.

mod activation_buffer;
mod bit_allocation;
mod block_compressor;
mod calibration_recipe;
mod calibration_source;
mod calibration_statistics;
mod calibration_stream;
mod calibration_tokens;
mod compensation;
mod compression;
mod conversion;
mod dense_companion;
mod disk_plan;
mod eora_inputs;
mod eora_recipe;
mod eora_unit;
mod folding;
mod inspection;
mod job_identity;
mod ledger_unit;
mod linear_override;
mod memory_plan;
mod merging;
mod output_format;
mod output_sums;
mod plan;
mod rank_ablation;
mod rank_division;
mod recipe;
mod recovered_scales;
mod report;
mod scale_folding;
mod solved_factors;

pub use block_compressor::{BlockCompressor, CalibrationInput, CompressedBlock};
pub use calibration_recipe::{ActivationPlace, CalibrationRecipe, CalibrationSource};
pub use calibration_source::CalibrationKind;
pub use calibration_statistics::{SavedStatistics, StatisticsWriter};
pub use calibration_stream::{CalibrationStream, CapturedInputs};
pub use calibration_tokens::CalibrationTokens;
pub use compensation::{
    CompensateRecipe, CompensationJobSummary, CompensationPlan, CompensationReport, PlannedCompensation, compensate,
    plan_compensation,
};
pub use compression::{compress, plan};
pub use conversion::{ConversionReport, ConvertRecipe, ConvertedLinear, convert};
pub use dense_companion::CapturedDrift;
pub use disk_plan::DiskPlan;
pub use eora_inputs::EoraInputs;
pub use eora_recipe::{AllocationRecipe, EoraRecipe, RankWeights};
pub use folding::{FoldRecipe, FoldReport, fold_adapter};
pub use inspection::{Inspection, inspect};
pub use kintsugi_compensate::RankBudget;
pub use linear_override::LinearOverride;
pub use memory_plan::{MemoryParts, MemoryPlan};
pub use merging::{
    AdapterShare, JoinReport, JoinSummary, MergeChange, MergePlan, MergeRecipe, MergeReport, MergeSummary,
    ModuleMergeReport, PlannedMerge, RankPadding, VLLM_RANKS, WholeModuleRule, changed_recipe, merge_adapters,
    plan_merge,
};
pub use plan::{Plan, PlannedLinear};
pub use rank_ablation::{AblatedGroup, AblationReport};
pub use rank_division::AllocationReport;
pub use recipe::Recipe;
pub use report::{CalibrationShare, CompensationSummary, LinearReport, MeanError, PhaseSeconds, Report, Summary};
