//! Merging PEFT folders, module by module.

mod factor_spill;
mod input_statistics;
mod merge_change;
mod merge_job;
mod merge_picture;
mod merge_plan;
mod merge_recipe;
mod merge_report;
mod source_print;
mod stored_merge;
mod united_module;
mod whole_modules;

pub use merge_change::{MergeChange, changed_recipe};
pub use merge_job::{merge_adapters, plan_merge};
pub use merge_plan::{MergePlan, PlannedMerge};
pub use merge_recipe::{MergeRecipe, RankPadding, VLLM_RANKS, WholeModuleRule};
pub use merge_report::{AdapterShare, JoinReport, JoinSummary, MergeReport, MergeSummary, ModuleMergeReport};
