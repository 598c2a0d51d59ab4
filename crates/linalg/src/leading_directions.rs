use kintsugi_runtime::{Result, ThreadPool};

use crate::{
    MatrixView, SplitMix64, SymmetricEigen, ThinQr, combine_rows, product, row_gram, row_products, symmetric_product,
    transposed,
};

/// Rows up to which a matrix of f32 is decomposed completely.
const COMPLETE: usize = 1024;
/// Directions that the iteration carries beyond those asked for, as a share of them and at least this many.
const EXTRA: usize = 16;
/// Most passes of the iteration over the matrix.
const PASSES: usize = 40;
/// Relative growth of the captured energy at which the iteration ends.
const SETTLED: f64 = 1e-10;

/// The elements of a matrix, `[rows, columns]` row-major.
#[derive(Clone, Copy, Debug)]
enum Elements<'a> {
    F64(&'a [f64]),
    F32(&'a [f32]),
}

/// The singular values and left singular vectors of a matrix with no more rows than columns.
///
/// They are eigenvectors of `A Aᵀ`. What is made of them is a projection of A, whose error is the least for its rank
/// up to the square of the rounding error of the vectors, so that squaring the matrix costs no accuracy that shows.
#[derive(Debug)]
pub struct LeadingDirections<'a> {
    elements: Elements<'a>,
    rows: usize,
    columns: usize,
    /// Descending; all of them, or the leading ones of a large matrix.
    pub values: Vec<f64>,
    /// `‖A‖²`.
    pub energy: f64,
    /// `[values, rows]`: orthonormal rows.
    vectors: Vec<f64>,
}

/// Factors of `A ≈ Σ leftᵢᵀ rightᵢ`, both of norm `√σᵢ`.
#[derive(Clone, Debug, PartialEq)]
pub struct BalancedFactors {
    /// Number of terms.
    pub rank: usize,
    /// `[rank, rows]`.
    pub left: Vec<f64>,
    /// `[rank, columns]`.
    pub right: Vec<f64>,
}

impl<'a> LeadingDirections<'a> {
    /// All directions of a row-major matrix.
    ///
    /// # Errors
    /// `ERR_SOLVER_FAILED` when the matrix is not finite.
    ///
    /// # Panics
    /// When the number of values does not fit or there are more rows than columns.
    pub fn new(a: &'a [f64], rows: usize, columns: usize, pool: &ThreadPool) -> Result<Self> {
        assert!(rows <= columns, "a tall matrix is turned by its caller");
        let view = MatrixView::new(a, rows, columns);
        let mut gram = vec![0.0; rows * rows];
        symmetric_product(view, view.transposed(), &mut gram, pool);
        Self::from_gram(Elements::F64(a), &gram, rows, columns)
    }

    /// At least the first `rank` directions of a row-major matrix of f32, in f64: all of them up to 1024 rows and
    /// where `rank` is close to the rows, else by subspace iteration (Halko, Martinsson and Tropp 2011) until no pass
    /// finds more energy.
    ///
    /// # Errors
    /// `ERR_SOLVER_FAILED` when the matrix is not finite.
    ///
    /// # Panics
    /// When the number of values does not fit or there are more rows than columns.
    pub fn of_f32(a: &'a [f32], rows: usize, columns: usize, rank: usize, pool: &ThreadPool) -> Result<Self> {
        assert!(rows <= columns, "a tall matrix is turned by its caller");
        let carried = Self::carried(rows, rank);
        if carried == rows {
            return Self::from_gram(Elements::F32(a), &row_gram(a, rows, columns, pool), rows, columns);
        }
        let mut random = SplitMix64::new(0x6b69_6e74);
        let start: Vec<f32> = (0..carried * columns).map(|_| (random.uniform() - 0.5) as f32).collect();
        let mut sketch = row_products(a, rows, &start, carried, columns, pool);
        let mut captured = 0.0;
        for pass in 1.. {
            let basis = transposed(&ThinQr::new(&sketch, rows, carried).q, rows, carried);
            let projected = combine_rows(&basis, carried, a, rows, columns, pool);
            let energy: f64 = projected.iter().map(|value| value * value).sum();
            if pass == PASSES || energy <= captured * (1.0 + SETTLED) {
                // Rotate the basis to the directions inside of it.
                let inside = LeadingDirections::new(&projected, carried, columns, pool)?;
                let mut vectors = vec![0.0; carried * rows];
                let rotation = MatrixView::new(&inside.vectors, carried, carried);
                product(rotation, MatrixView::new(&basis, carried, rows), &mut vectors, pool);
                let values = inside.values.clone();
                let energy = a.chunks(columns).map(|row| row.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>()).sum();
                return Ok(LeadingDirections { elements: Elements::F32(a), rows, columns, values, energy, vectors });
            }
            captured = energy;
            let projected: Vec<f32> = projected.iter().map(|&value| value as f32).collect();
            sketch = row_products(a, rows, &projected, carried, columns, pool);
        }
        unreachable!("the last pass returns")
    }

    /// Bytes that [`LeadingDirections::of_f32`] takes beside the matrix.
    pub fn working_bytes(rows: usize, columns: usize, rank: usize) -> u64 {
        let carried = Self::carried(rows, rank);
        let (rows, columns, kept) = (rows as u64, columns as u64, carried as u64);
        if carried as u64 == rows {
            // Gram matrix, what the eigensolver makes of it, eigenvectors.
            return rows.saturating_mul(8 * 3 * rows);
        }
        // Sketch, basis, directions; what they project in f64 and in f32.
        kept.saturating_mul(8 * 4 * rows + 12 * columns)
    }

    /// Directions that are carried to have `rank` of them: all rows where the matrix is decomposed completely.
    fn carried(rows: usize, rank: usize) -> usize {
        if rows <= COMPLETE { rows } else { rank.saturating_add(EXTRA.max(rank / 4)).min(rows) }
    }

    fn from_gram(elements: Elements<'a>, gram: &[f64], rows: usize, columns: usize) -> Result<Self> {
        let energy = (0..rows).map(|i| gram[i * (rows + 1)]).sum();
        let eigen = SymmetricEigen::new(gram, rows)?;
        let values = eigen.values.iter().map(|value| value.max(0.0).sqrt()).collect();
        Ok(LeadingDirections { elements, rows, columns, values, energy, vectors: eigen.vectors })
    }

    /// The best approximation of at most `rank` terms, largest first. Each left vector has its component of the
    /// largest magnitude positive. Terms that are rounding noise of the largest are left out.
    pub fn balanced(&self, rank: usize, pool: &ThreadPool) -> BalancedFactors {
        let rank = rank.min(self.values.len());
        let mut left = self.vectors[..rank * self.rows].to_vec();
        for vector in left.chunks_exact_mut(self.rows.max(1)) {
            let largest = vector.iter().fold(0.0f64, |best, &v| if v.abs() > best.abs() { v } else { best });
            if largest < 0.0 {
                vector.iter_mut().for_each(|value| *value = -*value);
            }
        }
        let mut right = match self.elements {
            Elements::F64(a) => {
                let mut right = vec![0.0; rank * self.columns];
                let vectors = MatrixView::new(&left, rank, self.rows);
                product(vectors, MatrixView::new(a, self.rows, self.columns), &mut right, pool);
                right
            }
            Elements::F32(a) => combine_rows(&left, rank, a, self.rows, self.columns, pool),
        };
        let norms: Vec<f64> =
            right.chunks_exact(self.columns.max(1)).map(|row| row.iter().map(|v| v * v).sum::<f64>().sqrt()).collect();
        let noise = norms.iter().fold(0.0f64, |most, &norm| most.max(norm)) * f64::EPSILON;
        let kept: Vec<usize> = (0..norms.len()).filter(|&i| norms[i] > noise).collect();
        for (i, norm) in norms.iter().enumerate() {
            let root = norm.sqrt();
            left[i * self.rows..(i + 1) * self.rows].iter_mut().for_each(|value| *value *= root);
            let down = if root > 0.0 { 1.0 / root } else { 0.0 };
            right[i * self.columns..(i + 1) * self.columns].iter_mut().for_each(|value| *value *= down);
        }
        let take = |rows: &[f64], width: usize| -> Vec<f64> {
            kept.iter().flat_map(|&i| rows[i * width..(i + 1) * width].iter().copied()).collect()
        };
        BalancedFactors { rank: kept.len(), left: take(&left, self.rows), right: take(&right, self.columns) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ThinSvd;

    /// A matrix of falling singular values: rank `rank` plus a little noise.
    fn matrix(rows: usize, columns: usize, rank: usize, noise: f64) -> Vec<f64> {
        let mut random = SplitMix64::new(rows as u64);
        let mut normal = || (0..12).map(|_| random.uniform()).sum::<f64>() - 6.0;
        let left: Vec<f64> = (0..rows * rank).map(|_| normal()).collect();
        let right: Vec<f64> = (0..rank * columns).map(|_| normal()).collect();
        let mut out = vec![0.0; rows * columns];
        for i in 0..rows {
            for l in 0..rank {
                let weight = left[i * rank + l] * 0.8f64.powi(l as i32);
                for j in 0..columns {
                    out[i * columns + j] += weight * right[l * columns + j];
                }
            }
        }
        out.iter_mut().for_each(|value| *value += noise * normal());
        out
    }

    fn error(a: &[f64], rows: usize, columns: usize, factors: &BalancedFactors) -> f64 {
        let mut sum = 0.0;
        for i in 0..rows {
            for j in 0..columns {
                let value: f64 =
                    (0..factors.rank).map(|l| factors.left[l * rows + i] * factors.right[l * columns + j]).sum();
                sum += (a[i * columns + j] - value).powi(2);
            }
        }
        sum.sqrt()
    }

    #[test]
    fn no_factors_of_a_rank_are_better() {
        let pool = ThreadPool::with_threads(2);
        for (rows, columns, rank) in [(1, 1, 1), (5, 9, 3), (40, 60, 12)] {
            let a = matrix(rows, columns, rows.min(10), 0.01);
            let svd = ThinSvd::new(&a, rows, columns).unwrap();
            let directions = LeadingDirections::new(&a, rows, columns, &pool).unwrap();
            for (value, expected) in directions.values.iter().zip(&svd.values) {
                assert!((value - expected).abs() <= 1e-7 * svd.values[0]);
            }
            let factors = directions.balanced(rank, &pool);
            let bound = svd.values[factors.rank..].iter().map(|v| v * v).sum::<f64>().sqrt();
            let found = error(&a, rows, columns, &factors);
            assert!(found <= bound * (1.0 + 1e-9) + 1e-12 * svd.values[0], "{found} {bound}");
        }
    }

    #[test]
    fn a_large_matrix_is_iterated_to_the_same() {
        let pool = ThreadPool::with_threads(2);
        let (rows, columns, rank) = (COMPLETE + 1, COMPLETE + 6, 6);
        let a = matrix(rows, columns, 24, 0.001);
        let narrow: Vec<f32> = a.iter().map(|&value| value as f32).collect();
        let iterated = LeadingDirections::of_f32(&narrow, rows, columns, rank, &pool).unwrap();
        assert!(iterated.values.len() < 100);
        let complete = LeadingDirections::new(&a, rows, columns, &pool).unwrap();
        for (value, expected) in iterated.values.iter().zip(&complete.values).take(rank) {
            assert!((value - expected).abs() <= 1e-6 * expected, "{value} {expected}");
        }
        let bound = (complete.energy - complete.values[..rank].iter().map(|v| v * v).sum::<f64>()).sqrt();
        let found = error(&a, rows, columns, &iterated.balanced(rank, &pool));
        assert!(found <= bound * (1.0 + 1e-6), "{found} {bound}");
    }

    #[test]
    fn a_large_matrix_of_which_all_is_asked_is_decomposed_completely() {
        let pool = ThreadPool::with_threads(2);
        let (rows, columns) = (COMPLETE + 1, COMPLETE + 2);
        let a: Vec<f32> = matrix(rows, columns, 8, 0.001).iter().map(|&value| value as f32).collect();
        let gram = row_gram(&a, rows, columns, &pool);
        let complete = LeadingDirections::from_gram(Elements::F32(&a), &gram, rows, columns).unwrap();
        let found = LeadingDirections::of_f32(&a, rows, columns, 1 << 16, &pool).unwrap();
        assert_eq!(found.values, complete.values);
        let bytes = |rank| LeadingDirections::working_bytes(rows, columns, rank);
        assert!(bytes(8) < bytes(64) && bytes(1 << 16) == 24 * (rows * rows) as u64);
        assert_eq!(LeadingDirections::working_bytes(usize::MAX, 1, usize::MAX), u64::MAX);
    }

    #[test]
    fn zeros_have_no_directions() {
        let pool = ThreadPool::with_threads(1);
        let factors = LeadingDirections::new(&[0.0; 6], 2, 3, &pool).unwrap().balanced(2, &pool);
        assert_eq!((factors.rank, factors.left.len(), factors.right.len()), (0, 0, 0));
    }
}
