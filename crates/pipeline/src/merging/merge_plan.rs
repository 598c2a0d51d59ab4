use kintsugi_weights::ElementType;
use serde::Serialize;

use crate::MergeRecipe;

/// What will be merged, from configs and headers; no factors are read. Modules that several adapters hold whole are
/// compared by their bytes where they must be equal.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct MergePlan {
    /// What was asked.
    pub recipe: MergeRecipe,
    /// The base model that the result names: that of the adapters, or of the compensation.
    pub base_model: Option<String>,
    /// Type of the factors that are written.
    pub factor_type: ElementType,
    /// In the order of the file.
    pub modules: Vec<PlannedMerge>,
    /// Tensors of modules that are saved whole, by their paths.
    pub whole_tensors: Vec<String>,
    /// Bytes of tensors that will be written; an upper bound where an energy target decides the ranks.
    pub bytes: u64,
    /// Bytes of the adapters' factors.
    pub source_bytes: u64,
    /// Estimate of the largest working set.
    pub memory_bytes: u64,
}

/// One module of a [`MergePlan`].
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PlannedMerge {
    /// Path in the base model.
    pub name: String,
    /// Rows of the update.
    pub out_features: usize,
    /// Columns of the update.
    pub in_features: usize,
    /// The adapters that have factors for it, as indices.
    pub adapters: Vec<usize>,
    /// Their ranks.
    pub ranks: Vec<usize>,
    /// Rank of the compensation that is joined, 0 without.
    pub compensation_rank: usize,
    /// Whether the calibration has statistics of its inputs.
    pub weighted: bool,
    /// Most that the rank of the result can be.
    pub rank: usize,
}
