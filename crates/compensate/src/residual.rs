use kintsugi_calibration::Calibration;
use kintsugi_linalg::{UpperTriangle, quadratic_trace_of};
use kintsugi_runtime::{Error, ErrorCode, Result, ThreadPool};
use kintsugi_weights::RowSource;

use crate::output_energies::{Energy, OutputEnergies};
use crate::residual_error::wide_row;

/// What compression took from a Linear: `Δ = W − Ŵ`, with the statistics of its inputs.
pub struct Residual<'a> {
    rows: usize,
    columns: usize,
    delta: Vec<f64>,
    calibration: &'a Calibration,
    energy: Energy,
    original: f64,
    narrow: Option<NarrowResidual>,
}

/// Δ and S in f32: directions are found in it where the energy of Δ is accurate in it.
pub(crate) struct NarrowResidual {
    /// `[rows, columns]`, row-major.
    pub(crate) delta: Vec<f32>,
    pub(crate) second_moment: UpperTriangle<f32>,
}

impl<'a> Residual<'a> {
    /// Share of an energy in f32 that its error does not show in.
    const LEAST_REST: f64 = 0.05;

    /// The difference of both matrices, and its energy; `original` is `‖W X‖²` where that is known.
    ///
    /// # Errors
    /// `ERR_SHAPE_MISMATCH` when weight, compressed weight and calibration do not belong together,
    /// `ERR_VALUE_NOT_FINITE` for NaN or infinite weights.
    pub fn new(
        weight: &dyn RowSource,
        compressed: &dyn RowSource,
        calibration: &'a Calibration,
        original: Option<f64>,
        pool: &ThreadPool,
    ) -> Result<Self> {
        let delta = lost(weight, compressed, calibration, pool)?;
        Ok(Residual::of(delta, weight, calibration, original, pool))
    }

    /// Of a Δ that is known: what is to be repaired, whatever it is.
    pub(crate) fn of(
        delta: Vec<f64>,
        weight: &dyn RowSource,
        calibration: &'a Calibration,
        original: Option<f64>,
        pool: &ThreadPool,
    ) -> Self {
        let (rows, columns) = (weight.rows(), weight.columns());
        let energies = OutputEnergies::new(calibration);
        let fill = |i: usize, row: &mut [f64]| row.copy_from_slice(&delta[i * columns..(i + 1) * columns]);
        let energy = energies.of(rows, fill, pool);
        let of_weight = || energies.of(rows, |i, row| wide_row(weight, i, row), pool).value;
        let original = original.unwrap_or_else(of_weight);
        let narrow = energies.into_narrow().filter(|_| energy.narrow).map(|second_moment| NarrowResidual {
            delta: delta.iter().map(|&value| value as f32).collect(),
            second_moment,
        });
        Residual { rows, columns, delta, calibration, energy, original, narrow }
    }

    /// Bytes beside the weights and the statistics: Δ in f64 and f32, and the second moments in f32.
    pub fn bytes(rows: usize, columns: usize) -> u64 {
        (rows as u64).saturating_mul(12 * columns as u64).saturating_add(OutputEnergies::bytes(columns))
    }

    /// Δ and S in f32, where that is accurate.
    pub(crate) fn narrow(&self) -> Option<&NarrowResidual> {
        self.narrow.as_ref()
    }

    /// Computes `‖Δ X‖²` again in f64 where it is known in f32 and too little is left of it for that: directions that
    /// capture `captured` leave a difference. Gives whether it has changed.
    pub(crate) fn sharpen(&mut self, captured: f64, pool: &ThreadPool) -> bool {
        let enough = self.energy.value - captured >= Self::LEAST_REST * self.energy.value;
        if !self.energy.narrow || enough {
            return false;
        }
        let (delta, columns) = (&self.delta, self.columns);
        let fill = |i: usize, row: &mut [f64]| row.copy_from_slice(&delta[i * columns..(i + 1) * columns]);
        let value = quadratic_trace_of(self.rows, fill, self.calibration.second_moment(), pool);
        self.energy = Energy { value, narrow: false };
        self.narrow = None;
        true
    }

    /// Counts what W answers to the mean of inputs whose statistics are centred, `T ‖W μ‖²`: errors are relative to the
    /// outputs of the inputs as they are.
    pub(crate) fn count_mean(&mut self, energy: f64) {
        self.original += energy;
    }

    /// Number of outputs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of inputs.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Δ, `[rows, columns]` row-major.
    pub fn delta(&self) -> &[f64] {
        &self.delta
    }

    /// Statistics of the inputs.
    pub fn calibration(&self) -> &Calibration {
        self.calibration
    }

    /// `‖Δ X‖²`.
    pub fn energy(&self) -> f64 {
        self.energy.value
    }

    /// `‖W X‖²`.
    pub fn original(&self) -> f64 {
        self.original
    }

    /// An error with that energy, relative to the original outputs.
    pub(crate) fn relative(&self, energy: f64) -> f64 {
        relative(energy, self.original)
    }
}

/// `W − Ŵ`, row-major.
///
/// # Errors
/// As [`Residual::new`].
pub(crate) fn lost(
    weight: &dyn RowSource,
    compressed: &dyn RowSource,
    calibration: &Calibration,
    pool: &ThreadPool,
) -> Result<Vec<f64>> {
    let (rows, columns) = (weight.rows(), weight.columns());
    check_shapes(weight, compressed, calibration)?;
    let mut delta = vec![0.0; rows * columns];
    let band = 64 * columns.max(1);
    pool.for_each_chunk(&mut delta, band, |index, values| {
        for (i, row) in values.chunks_exact_mut(columns.max(1)).enumerate() {
            difference(weight, compressed, index * 64 + i, row);
        }
    });
    let Some(at) = delta.iter().position(|value| !value.is_finite()) else { return Ok(delta) };
    let (row, column) = (at / columns, at % columns);
    let mut original = vec![0.0; columns];
    weight.row_to_f32(row, &mut original);
    let (of, subject, which) = match original[column].is_finite() {
        true => ("the compressed weight", "compressed weight", "The compressed checkpoint"),
        false => ("the weight", "weight", "The checkpoint"),
    };
    Err(Error::new(ErrorCode::ValueNotFinite, format!("{of} in row {row}, column {column} is NaN or infinite"))
        .subject(subject)
        .hint(format!("{which} is damaged; load it from its source again")))
}

fn check_shapes(weight: &dyn RowSource, compressed: &dyn RowSource, calibration: &Calibration) -> Result<()> {
    let shape = (weight.rows(), weight.columns());
    if shape == (compressed.rows(), compressed.columns()) && shape.1 == calibration.width() {
        return Ok(());
    }
    let message = format!(
        "a {}×{} weight, a {}×{} compressed weight and statistics of {} inputs do not belong to one Linear",
        shape.0,
        shape.1,
        compressed.rows(),
        compressed.columns(),
        calibration.width()
    );
    Err(Error::new(ErrorCode::ShapeMismatch, message).subject("eora"))
}

/// Row `i` of `W − Ŵ`.
pub(crate) fn difference(weight: &dyn RowSource, compressed: &dyn RowSource, i: usize, row: &mut [f64]) {
    let (mut original, mut rounded) = (vec![0.0; row.len()], vec![0.0; row.len()]);
    weight.row_to_f32(i, &mut original);
    compressed.row_to_f32(i, &mut rounded);
    for (value, (original, rounded)) in row.iter_mut().zip(original.into_iter().zip(rounded)) {
        *value = f64::from(original) - f64::from(rounded);
    }
}

/// `√(energy / original)`, or `√energy` where the original has none.
pub(crate) fn relative(energy: f64, original: f64) -> f64 {
    if original > 0.0 { energy.sqrt() / original.sqrt() } else { energy.sqrt() }
}
