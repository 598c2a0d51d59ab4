use kintsugi_linalg::{MatrixView, SymmetricEigen, ThinQr, product, product_by_columns, symmetric_product};
use kintsugi_runtime::{Result, ThreadPool};

use crate::Residual;
use crate::input_metric::InputMetric;

/// Orthonormal directions in the space of outputs: eigenvectors of `G = Δ M Δᵀ` for some metric M of the inputs.
#[derive(Clone, Debug)]
pub struct OutputDirections {
    /// Number of directions; fewer than asked for where G has fewer above rounding noise.
    pub rank: usize,
    /// `[rank, rows]`: orthonormal rows. The component of the largest magnitude is positive in each.
    pub vectors: Vec<f64>,
    /// `uᵢᵀ G uᵢ`: what each direction captures of `tr G`.
    pub values: Vec<f64>,
    /// How much more the best directions can capture at most.
    pub excess: f64,
}

impl OutputDirections {
    /// What the directions capture together.
    pub fn captured(&self) -> f64 {
        self.values.iter().sum()
    }

    /// `Σ uᵢᵀ G uᵢ` of the vectors as they are, for G with that metric, less what they lack of being orthonormal: what
    /// a proof counts.
    pub(crate) fn measured(&self, residual: &Residual<'_>, metric: &InputMetric<'_>, pool: &ThreadPool) -> f64 {
        let (rows, columns) = (residual.rows(), residual.columns());
        let directions = MatrixView::new(&self.vectors, self.rank, rows);
        let inputs = product_by_columns(directions, MatrixView::new(residual.delta(), rows, columns), pool);
        let weighted = metric.weigh_few(inputs.clone(), self.rank, columns, pool);
        let captured: f64 = inputs.iter().zip(&weighted).map(|(a, b)| a * b).sum();
        let gram = product_by_columns(directions, directions.transposed(), pool);
        let skew = |(at, value): (usize, &f64)| {
            let expected = if at % (self.rank + 1) == 0 { 1.0 } else { 0.0 };
            (value - expected).abs()
        };
        let skew = gram.iter().enumerate().map(skew).fold(0.0, f64::max);
        // Rounding leaves no vectors more orthogonal than this.
        if skew < 1e-12 { captured } else { captured * (1.0 - skew * self.rank as f64) }
    }

    /// From eigenvalues in descending order and the vectors of at least the first `rank` of them, a row each.
    pub(crate) fn new(values: &[f64], mut vectors: Vec<f64>, rows: usize, rank: usize, excess: f64) -> Self {
        let largest = values.first().copied().unwrap_or(0.0);
        let rank = values.iter().take(rank).take_while(|&&value| value > f64::EPSILON * largest).count();
        vectors.truncate(rank * rows);
        for vector in vectors.chunks_exact_mut(rows.max(1)) {
            let largest =
                vector.iter().fold(0.0f64, |best, &value| if value.abs() > best.abs() { value } else { best });
            if largest < 0.0 {
                vector.iter_mut().for_each(|value| *value = -*value);
            }
        }
        OutputDirections { rank, vectors, values: values[..rank].to_vec(), excess }
    }

    /// Bytes that [`OutputDirections::complete`] takes: an eigenproblem of the smaller side, behind a QR where Δ is tall.
    pub(crate) fn complete_bytes(rows: usize, columns: usize) -> u64 {
        let (side, values) = (rows.min(columns) as u64, rows as u64 * columns as u64);
        40 * side * side + if rows > columns { 3 } else { 1 } * 8 * values
    }

    /// From all eigenvalues of G. A tall Δ is first reduced to `Δ = Q R`: the eigenvectors of G are Q times those of the
    /// smaller `R M Rᵀ`.
    pub(crate) fn complete(
        residual: &Residual<'_>,
        metric: &InputMetric<'_>,
        rank: usize,
        pool: &ThreadPool,
    ) -> Result<Self> {
        let (rows, columns) = (residual.rows(), residual.columns());
        let reduced = (rows > columns).then(|| ThinQr::new(residual.delta(), rows, columns));
        let (side, coordinates) = match &reduced {
            Some(qr) => (columns, qr.r.as_slice()),
            None => (rows, residual.delta()),
        };
        let weighted = metric.weigh(coordinates.to_vec(), side, columns, pool);
        let mut gram = vec![0.0; side * side];
        let coordinates = MatrixView::new(coordinates, side, columns);
        symmetric_product(MatrixView::new(&weighted, side, columns), coordinates.transposed(), &mut gram, pool);
        drop(weighted);
        let eigen = SymmetricEigen::new(&gram, side)?;
        let rank = rank.min(side);
        let mut leading = eigen.vectors;
        leading.truncate(rank * side);
        let vectors = match reduced {
            Some(qr) => {
                let basis = MatrixView::new(&qr.q, rows, side);
                let mut vectors = vec![0.0; rank * rows];
                product(MatrixView::new(&leading, rank, side), basis.transposed(), &mut vectors, pool);
                vectors
            }
            None => leading,
        };
        Ok(Self::new(&eigen.values, vectors, rows, rank, 0.0))
    }
}
