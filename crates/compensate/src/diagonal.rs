use kintsugi_runtime::{Result, ThreadPool};

use crate::fast::leading;
use crate::input_metric::InputMetric;
use crate::{CompensationMethod, OutputDirections, Residual};

/// Channels are taken for uncorrelated: only the diagonal of S counts (QERA-approx, arXiv 2410.06040). For so few
/// calibration tokens that correlations would be chance.
pub struct Diagonal;

impl CompensationMethod for Diagonal {
    fn name(&self) -> &'static str {
        "diagonal"
    }

    fn is_optimal(&self) -> bool {
        false
    }

    fn directions(&self, residual: &Residual<'_>, rank: usize, pool: &ThreadPool) -> Result<OutputDirections> {
        let energies = residual.calibration().energies();
        let of_row = |row: &[f64]| -> f64 { row.iter().zip(&energies).map(|(value, e)| value * value * e).sum() };
        let energy = residual.delta().chunks_exact(residual.columns()).map(of_row).sum();
        leading(residual, &InputMetric::Energies(energies.clone()), energy, rank, pool)
    }
}
