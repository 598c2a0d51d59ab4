use kintsugi_calibration::Calibration;
use kintsugi_linalg::{
    MatrixView, product, product_by_columns, solve_symmetric, times_symmetric_by_columns, transposed,
};
use kintsugi_runtime::{Result, ThreadPool};
use kintsugi_weights::{ElementType, FactorCodes, LowRank, QuantizedMatrix, RowSource};

use crate::affine::compensate_affine;
use crate::factor_precision::{code_rows, round_floats, without_columns};
use crate::fast::Fast;
use crate::input_metric::InputMetric;
use crate::{
    Certificate, CompensationMethod, FactorPrecision, HoldOut, HoldOutProfile, OutputDirections, OutputSquares,
    RankProfile, Residual, ResidualError,
};

/// What to solve for.
#[derive(Clone, Copy)]
pub struct CompensationOptions {
    /// How directions are chosen.
    pub method: &'static dyn CompensationMethod,
    /// Columns of B and rows of A at most; fewer where the residual has fewer directions.
    pub rank: usize,
    /// What the factors are stored in.
    pub precision: FactorPrecision,
    /// Whether a bias repairs what the factors leave of the mean of the inputs.
    pub affine: bool,
}

impl Default for CompensationOptions {
    /// `fast`, rank 64, bf16, no bias.
    fn default() -> Self {
        let precision = FactorPrecision::Float(ElementType::Bf16);
        CompensationOptions { method: &Fast, rank: 64, precision, affine: false }
    }
}

/// The low-rank repair of one compressed Linear.
#[derive(Clone, Debug)]
pub struct Compensation {
    /// B and A as stored, directions in the order of their energy; `None` when the residual has no energy on the
    /// calibration inputs, or less than storing the factors would add.
    pub factors: Option<LowRank>,
    /// What was wrong before, and what is left.
    pub error: ResidualError,
    /// The proof that the directions are the best; `None` for methods that do not promise it.
    pub certificate: Option<Certificate>,
    /// What every smaller rank would leave.
    pub profile: RankProfile,
}

/// EoRA: factors of rank r that minimise `‖(W − Ŵ − B A) X‖` (arXiv 2410.21271), in output-PCA form.
///
/// With `Δ = W − Ŵ` and `S = X Xᵀ`, B holds the top r eigenvectors of `G = Δ S Δᵀ` and `A = Bᵀ Δ`: the same optimum as
/// the truncated SVD of `Δ S^½` times `S^−½`, without a root or an inverse of S, so that dead channels and fewer tokens
/// than channels need no care. `Δ − B A` is an orthogonal projection of Δ, so no input is made worse. Other
/// [methods](crate::METHODS) choose the directions in other metrics.
///
/// B is rounded to the stored type first. Row i of A is then what b̃ᵢ finds in the part of Δ that the rounded
/// directions before it have left, which keeps the projection property whatever the rounding of B, and keeps ranks
/// nested: a prefix of the factors is, bit for bit, the solution of that rank. Float factors are then balanced by
/// powers of two, which changes no digit of their product: `‖bᵢ‖ ≈ ‖aᵢ‖`, as training expects of an adapter. Factors
/// of codes are solved once more: B for the rounded A, in the metric of the inputs. Channels that rounding would make
/// worse than they were are left out of them.
///
/// With [`CompensationOptions::affine`] a bias is solved, too: `(Δ − B A) μ` for the mean μ of the inputs, and factors
/// for what the inputs differ from it. No rank, no bias.
///
/// `outputs` are squares of what W puts out, where they are known: `‖W X‖²`, which errors are relative to, takes about as
/// long as finding the directions. Those that roundings may show in are computed all the same.
///
/// # Errors
/// What [`Residual::new`] refuses, `ERR_VALUE_NOT_FINITE` for factors that the stored type cannot hold,
/// `ERR_SOLVER_FAILED`.
pub fn compensate(
    weight: &dyn RowSource,
    compressed: &dyn RowSource,
    calibration: &Calibration,
    hold_out: Option<&HoldOut>,
    outputs: Option<&OutputSquares>,
    options: &CompensationOptions,
    pool: &ThreadPool,
) -> Result<Compensation> {
    if options.affine {
        return compensate_affine(weight, compressed, calibration, hold_out, outputs, options, pool);
    }
    let original = outputs.and_then(|outputs| outputs.accurate(weight, calibration, pool));
    let mut residual = Residual::new(weight, compressed, calibration, original, pool)?;
    solve(&mut residual, weight, hold_out, outputs, options, pool)
}

/// [`compensate`] for a residual that is known: the factors in the metric of its statistics.
///
/// # Errors
/// As [`compensate`].
pub(crate) fn solve(
    residual: &mut Residual<'_>,
    weight: &dyn RowSource,
    hold_out: Option<&HoldOut>,
    outputs: Option<&OutputSquares>,
    options: &CompensationOptions,
    pool: &ThreadPool,
) -> Result<Compensation> {
    // The bound is that of the best directions, whatever the method believes.
    let optimal = options.method.is_optimal();
    let best_method = if optimal { options.method } else { &Fast };
    let mut best = best_method.directions(residual, options.rank, pool)?;
    if residual.sharpen(best.captured(), pool) {
        best = best_method.directions(residual, options.rank, pool)?;
    }
    let bounds = bounds(residual.energy(), &best);
    let certificate = optimal.then(|| {
        let metric = InputMetric::SecondMoment(residual.calibration().second_moment());
        let measured = best.measured(residual, &metric, pool);
        Certificate::new(residual.energy(), measured, best.captured() + best.excess, |energy| residual.relative(energy))
    });
    let directions = if optimal { best } else { options.method.directions(residual, options.rank, pool)? };
    let factors = match directions.rank {
        0 => None,
        _ => Some(stored_factors(residual, &directions, options.precision, pool)?),
    };
    let energies = factors.as_ref().map(|factors| RankProfile::energies(residual, factors, pool));
    // Both are read off a second moment whose last digits are rounding noise, which may be all that is left of them.
    let worthwhile = energies.as_ref().is_some_and(|energies| energies[energies.len() - 1] < energies[0]);
    let factors = factors.filter(|_| worthwhile);
    let profile = RankProfile {
        original: residual.original(),
        calibration: energies.filter(|_| worthwhile).unwrap_or_else(|| vec![residual.energy()]),
        best: bounds,
        hold_out: hold_out
            .map(|hold_out| HoldOutProfile::new(residual, factors.as_ref(), weight, (hold_out, outputs), pool)),
        dense: None,
    };
    let error = profile.error(profile.largest_rank());
    Ok(Compensation { factors, error, certificate, profile })
}

/// The factors that project on the directions, of which there are some, as they are stored.
pub(crate) fn stored_factors(
    residual: &Residual<'_>,
    directions: &OutputDirections,
    precision: FactorPrecision,
    pool: &ThreadPool,
) -> Result<LowRank> {
    match precision {
        FactorPrecision::Float(element) => float_factors(residual, directions, element, pool),
        FactorPrecision::Codes(bits) => coded_factors(residual, directions, bits, pool),
    }
}

/// The energies that no factors of the ranks 0, 1, … go below.
fn bounds(energy: f64, directions: &OutputDirections) -> Vec<f64> {
    let mut left = energy;
    let mut bounds = vec![energy];
    for value in &directions.values {
        left -= value;
        bounds.push((left - directions.excess).max(0.0));
    }
    bounds
}

fn float_factors(
    residual: &Residual<'_>,
    directions: &OutputDirections,
    element: ElementType,
    pool: &ThreadPool,
) -> Result<LowRank> {
    let (rows, columns, rank) = (residual.rows(), residual.columns(), directions.rank);
    let mut b = round_floats(&transposed(&directions.vectors, rank, rows), element, "B")?;
    let mut a = Vec::with_capacity(rank * columns);
    project(&widen(&b), residual, rank, pool, |row| {
        let rounded = round_floats(row, element, "A")?;
        a.extend_from_slice(&rounded);
        Ok(widen(&rounded))
    })?;
    balance(&mut b, &mut a, rank, columns, element);
    Ok(LowRank::new(rows, columns, rank, b, a, element))
}

/// Gives column i of B and row i of A about the same norm, by a power of two, where no value changes its digits.
fn balance(b: &mut [f32], a: &mut [f32], rank: usize, columns: usize, element: ElementType) {
    let exact = |value: f32, factor: f32| {
        let scaled = value * factor;
        scaled.is_finite() && element.round(scaled) == scaled && scaled / factor == value
    };
    for (i, row) in a.chunks_exact_mut(columns).enumerate() {
        let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|value| f64::from(value).powi(2)).sum::<f64>();
        let of_row = norm(&mut row.iter().copied());
        let of_column = norm(&mut b.iter().skip(i).step_by(rank).copied());
        if of_row == 0.0 || of_column == 0.0 {
            continue;
        }
        // Squares twice: a quarter of the binary logarithm of their ratio.
        let exponent = ((of_row / of_column).log2() / 4.0).round().clamp(-60.0, 60.0) as i32;
        let (up, down) = (2f32.powi(exponent), 2f32.powi(-exponent));
        let fits = b.iter().skip(i).step_by(rank).all(|&value| exact(value, up));
        if fits && row.iter().all(|&value| exact(value, down)) {
            b.iter_mut().skip(i).step_by(rank).for_each(|value| *value *= up);
            row.iter_mut().for_each(|value| *value *= down);
        }
    }
}

fn coded_factors(
    residual: &Residual<'_>,
    directions: &OutputDirections,
    bits: u8,
    pool: &ThreadPool,
) -> Result<LowRank> {
    let (rows, columns, rank) = (residual.rows(), residual.columns(), directions.rank);
    let b = code_rows(&transposed(&directions.vectors, rank, rows), rows, rank, bits)?;
    let mut values = Vec::with_capacity(rank * columns);
    project(&widen(&b.to_f32()), residual, rank, pool, |row| {
        let rounded = widen(&code_rows(row, 1, columns, bits)?.to_f32());
        values.extend_from_slice(row);
        Ok(rounded)
    })?;
    let a = spare_channels(residual, &b, code_rows(&values, rank, columns, bits)?, pool)?;
    let first = LowRank::of_codes(FactorCodes { b, a: a.clone() });
    let Some(refitted) = refit(residual, &a.to_f32(), rank, pool) else { return Ok(first) };
    let b = code_rows(&refitted, rows, rank, bits)?;
    let a = spare_channels(residual, &b, a, pool)?;
    let second = LowRank::of_codes(FactorCodes { b, a });
    let left = |factors: &LowRank| {
        let energies = RankProfile::energies(residual, factors, pool);
        energies[factors.rank()]
    };
    Ok(if left(&second) < left(&first) { second } else { first })
}

/// A without the channels that B A would make worse, `‖δⱼ − B aⱼ‖ > ‖δⱼ‖`: a channel of which A finds little, in a run
/// with one of which it finds much, is left with rounding noise.
fn spare_channels(
    residual: &Residual<'_>,
    b: &QuantizedMatrix,
    a: QuantizedMatrix,
    pool: &ThreadPool,
) -> Result<QuantizedMatrix> {
    let (rows, columns, rank) = (residual.rows(), residual.columns(), a.rows());
    let (b, values) = (widen(&b.to_f32()), widen(&a.to_f32()));
    let directions = MatrixView::new(&b, rows, rank).transposed();
    let found = product_by_columns(directions, MatrixView::new(residual.delta(), rows, columns), pool);
    let gram = product_by_columns(directions, directions.transposed(), pool);
    let repaired =
        product_by_columns(MatrixView::new(&gram, rank, rank), MatrixView::new(&values, rank, columns), pool);
    // ‖δ − B a‖² − ‖δ‖² = aᵀ BᵀB a − 2 aᵀ Bᵀδ, for every channel.
    let mut change = vec![0.0; columns];
    for (at, value) in values.iter().enumerate() {
        change[at % columns] += value * (repaired[at] - 2.0 * found[at]);
    }
    let worse: Vec<bool> = change.iter().map(|&change| change > 0.0).collect();
    if worse.contains(&true) { without_columns(&a, &worse) } else { Ok(a) }
}

/// `B = Δ S Ãᵀ (Ã S Ãᵀ)⁻¹`, `[rows, rank]`: the best B for a rounded A. `None` where `Ã S Ãᵀ` is singular.
fn refit(residual: &Residual<'_>, a: &[f32], rank: usize, pool: &ThreadPool) -> Option<Vec<f64>> {
    let (rows, columns) = (residual.rows(), residual.columns());
    let a = widen(a);
    let view = MatrixView::new(&a, rank, columns);
    let weighted = times_symmetric_by_columns(view, residual.calibration().second_moment(), pool);
    let weighted = MatrixView::new(&weighted, rank, columns);
    let gram = product_by_columns(weighted, view.transposed(), pool);
    // [rank, rows]
    let target = product_by_columns(weighted, MatrixView::new(residual.delta(), rows, columns).transposed(), pool);
    let solved = solve_symmetric(&gram, rank, target, rows)?;
    Some(transposed(&solved, rank, rows))
}

/// A for the rounded B `[rows, rank]`: row i is `b̃ᵢᵀ (Δ − Σ_{j<i} b̃ⱼ ãⱼ) / ‖b̃ᵢ‖²`; `round` takes it and gives what is
/// stored of it.
fn project(
    b: &[f64],
    residual: &Residual<'_>,
    rank: usize,
    pool: &ThreadPool,
    mut round: impl FnMut(&[f64]) -> Result<Vec<f64>>,
) -> Result<()> {
    let (rows, columns) = (residual.rows(), residual.columns());
    let directions = MatrixView::new(b, rows, rank).transposed();
    let mut gram = vec![0.0; rank * rank];
    product(directions, directions.transposed(), &mut gram, pool);
    let mut found = product_by_columns(directions, MatrixView::new(residual.delta(), rows, columns), pool);
    for i in 0..rank {
        let (done, open) = found.split_at_mut((i + 1) * columns);
        let row = &mut done[i * columns..];
        let square = gram[i * (rank + 1)];
        row.iter_mut().for_each(|value| *value = if square > 0.0 { *value / square } else { 0.0 });
        let stored = round(row)?;
        let own = &gram[i * rank..(i + 1) * rank];
        pool.for_each_chunk(open, columns, |later, row| {
            let factor = own[i + 1 + later];
            row.iter_mut().zip(&stored).for_each(|(value, stored)| *value -= factor * stored);
        });
    }
    Ok(())
}

pub(crate) fn widen(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&value| f64::from(value)).collect()
}
