use kintsugi_linalg::{BlockKrylov, MatrixView};
use kintsugi_runtime::{Result, ThreadPool};

use crate::input_metric::{InputMetric, OutputOperator};
use crate::{Certificate, CompensationMethod, OutputDirections, Residual};

/// EoRA by a block-Krylov space that grows until its residuals prove the directions good enough; completely where
/// that costs less or they never do.
pub struct Fast;

impl CompensationMethod for Fast {
    fn name(&self) -> &'static str {
        "fast"
    }

    fn is_optimal(&self) -> bool {
        true
    }

    fn directions(&self, residual: &Residual<'_>, rank: usize, pool: &ThreadPool) -> Result<OutputDirections> {
        let metric = InputMetric::SecondMoment(residual.calibration().second_moment());
        leading(residual, &metric, residual.energy(), rank, pool)
    }
}

/// Leading directions in a metric in which Δ has that energy.
pub(crate) fn leading(
    residual: &Residual<'_>,
    metric: &InputMetric<'_>,
    energy: f64,
    rank: usize,
    pool: &ThreadPool,
) -> Result<OutputDirections> {
    let rows = residual.rows();
    if BlockKrylov::pays(rows.min(residual.columns()), rank) {
        let operator = OutputOperator { delta: MatrixView::new(residual.delta(), rows, residual.columns()), metric };
        let enough = |captured: f64, excess: f64| Certificate::suffices(energy, captured, excess);
        if let Some(found) = BlockKrylov::new(&operator, rank, enough, pool)? {
            return Ok(OutputDirections::new(&found.values, found.vectors, rows, rank, found.excess));
        }
    }
    OutputDirections::complete(residual, metric, rank, pool)
}
