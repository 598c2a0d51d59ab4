use kintsugi_pipeline::{AllocationRecipe, EoraInputs, EoraRecipe, RankBudget, RankWeights};
use kintsugi_runtime::Result;
use napi_derive::napi;

use crate::compress::bits;
use crate::error::invalid_option;

/// How a compensation is solved; `src/eora.ts` fills in the defaults.
#[napi(object, object_to_js = false)]
pub struct BindingEora {
    pub rank: u32,
    pub solver: String,
    pub factor_bits: u32,
    /// `deployed`, `dense` or `mixed`.
    pub inputs: String,
    pub mismatch: Option<f64>,
    pub affine: bool,
    pub grouped: bool,
    pub mean_rank: Option<f64>,
    pub budget_bytes: Option<f64>,
    pub min_rank: u32,
    pub rank_multiple: u32,
    /// `outputs`, `equal` or `ablation`.
    pub rank_weights: String,
}

impl BindingEora {
    pub(crate) fn recipe(&self) -> Result<EoraRecipe> {
        let budget = match (self.mean_rank, self.budget_bytes) {
            (Some(mean), _) => Some(RankBudget::MeanRank(mean)),
            (None, bytes) => bytes.map(|bytes| RankBudget::Bytes(bytes as u64)),
        };
        let weights = RankWeights::from_name(&self.rank_weights)
            .ok_or_else(|| invalid_option("eora.rankWeights", &self.rank_weights, RankWeights::NAMES))?;
        let allocation = budget.map(|budget| AllocationRecipe {
            budget,
            min_rank: self.min_rank as usize,
            multiple: self.rank_multiple as usize,
            weights,
        });
        let (rank, solver) = (self.rank as usize, self.solver.clone());
        let inputs = EoraInputs::from_name(&self.inputs, self.mismatch)
            .ok_or_else(|| invalid_option("eora.inputs", &self.inputs, EoraInputs::NAMES))?;
        let (factor_bits, affine, grouped) = (bits(self.factor_bits), self.affine, self.grouped);
        Ok(EoraRecipe { rank, solver, factor_bits, inputs, affine, grouped, allocation })
    }
}
