use kintsugi_runtime::{Result, ThreadPool};

use crate::input_metric::InputMetric;
use crate::{CompensationMethod, OutputDirections, Residual};

/// EoRA by the complete eigendecomposition of `Δ S Δᵀ`, or of the smaller side: what everything else is checked
/// against, and what small matrices cost least with.
pub struct Exact;

impl CompensationMethod for Exact {
    fn name(&self) -> &'static str {
        "exact"
    }

    fn is_optimal(&self) -> bool {
        true
    }

    fn directions(&self, residual: &Residual<'_>, rank: usize, pool: &ThreadPool) -> Result<OutputDirections> {
        let metric = InputMetric::SecondMoment(residual.calibration().second_moment());
        OutputDirections::complete(residual, &metric, rank, pool)
    }
}
