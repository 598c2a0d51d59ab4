use kintsugi_linalg::{BlockKrylov, MatrixView};
use kintsugi_runtime::{Result, ThreadPool};

use crate::input_metric::{InputMetric, NarrowOperator, OutputOperator};
use crate::{Certificate, CompensationMethod, OutputDirections, Residual};

/// EoRA by a block-Krylov space that grows until its residuals prove the directions good enough; completely where
/// that costs less.
pub struct Fast;

impl CompensationMethod for Fast {
    fn name(&self) -> &'static str {
        "fast"
    }

    fn is_optimal(&self) -> bool {
        true
    }

    fn directions(&self, residual: &Residual<'_>, rank: usize, pool: &ThreadPool) -> Result<OutputDirections> {
        if let Some(found) = narrowly(residual, rank, pool)? {
            return Ok(found);
        }
        let metric = InputMetric::SecondMoment(residual.calibration().second_moment());
        leading(residual, &metric, residual.energy(), rank, pool)
    }
}

/// What roundings of f32 can amount to in what directions capture, as a share of it.
const NARROW_ROUNDINGS: f64 = 1e-6;

/// Leading directions in f32, half the time; `None` where that is not accurate enough.
fn narrowly(residual: &Residual<'_>, rank: usize, pool: &ThreadPool) -> Result<Option<OutputDirections>> {
    let (rows, columns) = (residual.rows(), residual.columns());
    let Some(narrow) = residual.narrow().filter(|_| BlockKrylov::pays(rows.min(columns), rank)) else {
        return Ok(None);
    };
    let delta = MatrixView::new(&narrow.delta, rows, columns);
    let operator = NarrowOperator { delta, second_moment: &narrow.second_moment };
    let missing = |captured: f64, excess: f64| excess + NARROW_ROUNDINGS * captured;
    let enough =
        |captured: f64, excess: f64| Certificate::suffices(residual.energy(), captured, missing(captured, excess));
    let found = BlockKrylov::new(&operator, rank, 0, enough, pool)?;
    Ok(found.sufficient.then(|| {
        let captured: f64 = found.values.iter().take(rank).sum();
        OutputDirections::new(&found.values, found.vectors, rows, rank, missing(captured, found.excess))
    }))
}

/// Bytes that finding the directions of a `[rows, columns]` residual takes at most.
pub fn directions_bytes(rows: usize, columns: usize, rank: usize) -> u64 {
    if BlockKrylov::pays(rows.min(columns), rank) {
        BlockKrylov::working_bytes(rows, rank) + BlockKrylov::block_size(rows, rank) as u64 * columns as u64 * 16
    } else {
        OutputDirections::complete_bytes(rows, columns)
    }
}

/// Leading directions in a metric in which Δ has that energy. Where no space of a few blocks is enough, all of them are
/// computed if that takes no more memory.
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
        let found = BlockKrylov::new(&operator, rank, BlockKrylov::RESTARTS, enough, pool)?;
        let complete = OutputDirections::complete_bytes(rows, residual.columns());
        // Whether what was not enough is good enough all the same is for the certificate to say.
        if found.sufficient || complete > directions_bytes(rows, residual.columns(), rank) {
            return Ok(OutputDirections::new(&found.values, found.vectors, rows, rank, found.excess));
        }
    }
    OutputDirections::complete(residual, metric, rank, pool)
}
