use kintsugi_runtime::{Result, ThreadPool};

use crate::fast::leading;
use crate::input_metric::InputMetric;
use crate::{CompensationMethod, OutputDirections, Residual};

/// The truncated singular value decomposition of Δ, whatever the inputs are (LoRC of ZeroQuant-V2, arXiv 2303.08302):
/// a baseline.
pub struct Lorc;

impl CompensationMethod for Lorc {
    fn name(&self) -> &'static str {
        "lorc"
    }

    fn is_optimal(&self) -> bool {
        false
    }

    fn directions(&self, residual: &Residual<'_>, rank: usize, pool: &ThreadPool) -> Result<OutputDirections> {
        let energy = residual.delta().iter().map(|value| value * value).sum();
        leading(residual, &InputMetric::Identity, energy, rank, pool)
    }
}
