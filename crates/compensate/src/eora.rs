use kintsugi_calibration::Calibration;
use kintsugi_linalg::{
    MatrixView, SymmetricEigen, ThinQr, product, subtract_product, symmetric_product, times_symmetric,
};
use kintsugi_runtime::{Error, ErrorCode, Result, ThreadPool};
use kintsugi_weights::{DenseMatrix, ElementType, LowRank, QuantizedMatrix};

use crate::ResidualError;
use crate::residual_error::{energy, relative, residual, weight_energy};

/// What to solve for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EoraOptions {
    /// Columns of B and rows of A at most; fewer where the residual has fewer directions.
    pub rank: usize,
    /// The type that the factors are stored in.
    pub factor_type: ElementType,
}

impl Default for EoraOptions {
    /// Rank 64, bf16.
    fn default() -> Self {
        EoraOptions { rank: 64, factor_type: ElementType::Bf16 }
    }
}

/// The best low-rank repair of one compressed Linear.
#[derive(Clone, Debug)]
pub struct Compensation {
    /// B and A as stored, directions in the order of their energy; `None` when the residual has no energy on the
    /// calibration inputs, or less than storing the factors would add.
    pub factors: Option<LowRank>,
    /// What was wrong before, and what is left.
    pub error: ResidualError,
}

/// EoRA: the factors of rank r that minimise `‖(W − Ŵ − B A) X‖` (arXiv 2410.21271), in output-PCA form.
///
/// With `Δ = W − Ŵ` and `S = X Xᵀ`, B holds the top r eigenvectors of `G = Δ S Δᵀ` and `A = Bᵀ Δ`: the same optimum as
/// the truncated SVD of `Δ S^½` times `S^−½`, without a root or an inverse of S, so that dead channels and fewer tokens
/// than channels need no care. `Δ − B A` is an orthogonal projection of Δ, so no input is made worse. A tall Δ is
/// first reduced to `Δ = Q R`: the eigenvectors of `G` are Q times those of the smaller `R S Rᵀ`.
///
/// B is rounded to the stored type first. Row i of A is then what b̃ᵢ finds in the part of Δ that the rounded
/// directions before it have left, which keeps the projection property whatever the rounding of B, and keeps ranks
/// nested: a prefix of the factors is, bit for bit, the solution of that rank.
///
/// # Errors
/// `ERR_SHAPE_MISMATCH` when weight, quantized weight and calibration do not belong together,
/// `ERR_VALUE_NOT_FINITE` for NaN or infinite weights or factors that the stored type cannot hold,
/// `ERR_SOLVER_FAILED`.
pub fn eora(
    weight: &DenseMatrix,
    quantized: &QuantizedMatrix,
    calibration: &Calibration,
    options: &EoraOptions,
    pool: &ThreadPool,
) -> Result<Compensation> {
    check_input(weight, quantized, calibration)?;
    let (rows, columns) = (weight.rows(), weight.columns());
    let original = weight_energy(weight, calibration, pool);
    let mut delta = residual(weight, quantized);
    let spectrum = OutputSpectrum::new(&delta, rows, columns, calibration, pool)?;

    let rank = options.rank.min(spectrum.numerical_rank());
    let bound = relative(spectrum.tail(rank), original);
    let before = relative(spectrum.energy, original);
    if rank == 0 {
        return Ok(Compensation {
            factors: None,
            error: ResidualError { quantized: before, compensated: before, bound },
        });
    }
    let b = round_all(spectrum.leading_directions(rank, pool), options.factor_type, "B")?;
    let a = project(&b, &delta, rank, columns, options.factor_type, pool)?;

    let (wide_b, wide_a) = (widen(&b), widen(&a));
    let (b_view, a_view) = (MatrixView::new(&wide_b, rows, rank), MatrixView::new(&wide_a, rank, columns));
    subtract_product(b_view, a_view, &mut delta, pool);
    let after = relative(energy(&delta, rows, calibration, pool), original);
    // Both are read off a second moment whose last digits are rounding noise, which may be all that is left of them.
    let bound = bound.min(after);
    let worthwhile = after < before;
    Ok(Compensation {
        factors: worthwhile.then(|| LowRank::new(rows, columns, rank, b, a, options.factor_type)),
        error: ResidualError { quantized: before, compensated: if worthwhile { after } else { before }, bound },
    })
}

fn check_input(weight: &DenseMatrix, quantized: &QuantizedMatrix, calibration: &Calibration) -> Result<()> {
    let shape = (weight.rows(), weight.columns());
    if shape != (quantized.rows(), quantized.columns()) || shape.1 != calibration.width() {
        let message = format!(
            "a {}×{} weight, a {}×{} quantized weight and statistics of {} inputs do not belong to one Linear",
            shape.0,
            shape.1,
            quantized.rows(),
            quantized.columns(),
            calibration.width()
        );
        return Err(Error::new(ErrorCode::ShapeMismatch, message).subject("eora"));
    }
    if let Some((row, column)) = weight.first_not_finite() {
        let message = format!("the weight in row {row}, column {column} is NaN or infinite");
        return Err(Error::new(ErrorCode::ValueNotFinite, message)
            .subject("weight")
            .hint("The checkpoint is damaged; load it from its source again"));
    }
    if let Some(scale) = quantized.scales().iter().find(|scale| !scale.is_finite()) {
        let message = format!("the quantized weight has a scale of {scale}");
        return Err(Error::new(ErrorCode::ValueNotFinite, message).subject("quantized weight"));
    }
    Ok(())
}

/// Eigenvalues and eigenvectors of `G = Δ S Δᵀ`.
struct OutputSpectrum {
    rows: usize,
    /// `tr G = ‖Δ X‖²`.
    energy: f64,
    /// Descending, not negative; as many as the smaller side of Δ.
    values: Vec<f64>,
    /// `[values, values or rows]`, a vector per row.
    vectors: Vec<f64>,
    /// Orthonormal `[rows, values]`, where the vectors are coordinates in the columns of it.
    basis: Option<Vec<f64>>,
}

impl OutputSpectrum {
    fn new(delta: &[f64], rows: usize, columns: usize, calibration: &Calibration, pool: &ThreadPool) -> Result<Self> {
        let reduced = (rows > columns).then(|| ThinQr::new(delta, rows, columns));
        let (side, coordinates) = match &reduced {
            Some(qr) => (columns, qr.r.as_slice()),
            None => (rows, delta),
        };
        let coordinates = MatrixView::new(coordinates, side, columns);
        let mut weighted = vec![0.0; side * columns];
        times_symmetric(coordinates, calibration.second_moment(), &mut weighted, pool);
        let mut gram = vec![0.0; side * side];
        symmetric_product(MatrixView::new(&weighted, side, columns), coordinates.transposed(), &mut gram, pool);
        drop(weighted);
        let energy = (0..side).map(|i| gram[i * (side + 1)]).sum::<f64>().max(0.0);
        let eigen = SymmetricEigen::new(&gram, side)?;
        Ok(OutputSpectrum {
            rows,
            energy,
            values: eigen.values.iter().map(|value| value.max(0.0)).collect(),
            vectors: eigen.vectors,
            basis: reduced.map(|qr| qr.q),
        })
    }

    /// Directions whose energy is more than rounding noise of the largest.
    fn numerical_rank(&self) -> usize {
        let largest = self.values.first().copied().unwrap_or(0.0);
        self.values.iter().take_while(|&&value| value > f64::EPSILON * largest).count()
    }

    /// The energy outside of the first `rank` directions.
    fn tail(&self, rank: usize) -> f64 {
        self.values[rank..].iter().rev().sum()
    }

    /// The first `rank` unit eigenvectors as the columns of a `[rows, rank]` matrix. The component of the largest
    /// magnitude is positive in each.
    fn leading_directions(&self, rank: usize, pool: &ThreadPool) -> Vec<f64> {
        let side = self.values.len();
        let leading = MatrixView::new(&self.vectors, side, side).row_range(0..rank);
        let mut directions = vec![0.0; self.rows * rank];
        match &self.basis {
            Some(basis) => {
                product(MatrixView::new(basis, self.rows, side), leading.transposed(), &mut directions, pool);
            }
            None => {
                for (row, directions) in directions.chunks_exact_mut(rank).enumerate() {
                    for (i, value) in directions.iter_mut().enumerate() {
                        *value = self.vectors[i * side + row];
                    }
                }
            }
        }
        for i in 0..rank {
            let column = directions.iter().skip(i).step_by(rank);
            let largest = column.fold(0.0f64, |best, &value| if value.abs() > best.abs() { value } else { best });
            if largest < 0.0 {
                directions.iter_mut().skip(i).step_by(rank).for_each(|value| *value = -*value);
            }
        }
        directions
    }
}

/// A for the rounded B: row i is `b̃ᵢᵀ (Δ − Σ_{j<i} b̃ⱼ ãⱼ) / ‖b̃ᵢ‖²`, rounded, with the rounded rows before it.
fn project(
    b: &[f32],
    delta: &[f64],
    rank: usize,
    columns: usize,
    factor_type: ElementType,
    pool: &ThreadPool,
) -> Result<Vec<f32>> {
    let rows = b.len() / rank;
    let wide = widen(b);
    let transposed = MatrixView::new(&wide, rows, rank).transposed();
    let mut gram = vec![0.0; rank * rank];
    symmetric_product(transposed, MatrixView::new(&wide, rows, rank), &mut gram, pool);
    let mut projected = vec![0.0; rank * columns];
    product(transposed, MatrixView::new(delta, rows, columns), &mut projected, pool);
    let mut a: Vec<f32> = Vec::with_capacity(rank * columns);
    for i in 0..rank {
        let mut row = projected[i * columns..(i + 1) * columns].to_vec();
        for (j, before) in a.chunks_exact(columns).enumerate() {
            for (value, &before) in row.iter_mut().zip(before) {
                *value -= gram[i * rank + j] * f64::from(before);
            }
        }
        row.iter_mut().for_each(|value| *value /= gram[i * (rank + 1)]);
        a.extend(round_all(row, factor_type, "A")?);
    }
    Ok(a)
}

fn round_all(values: Vec<f64>, factor_type: ElementType, factor: &str) -> Result<Vec<f32>> {
    let rounded: Vec<f32> = values.iter().map(|&value| factor_type.round(value as f32)).collect();
    if rounded.iter().all(|value| value.is_finite()) {
        return Ok(rounded);
    }
    let message = format!("factor {factor} has values that {} cannot hold", factor_type.name());
    Err(Error::new(ErrorCode::ValueNotFinite, message).subject("eora").hint("Store the factors as bf16 or f32"))
}

fn widen(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&value| f64::from(value)).collect()
}
