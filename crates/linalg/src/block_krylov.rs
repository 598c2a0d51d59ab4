use kintsugi_runtime::{Result, ThreadPool};

use crate::triangular::solve_lower_by_columns;
use crate::{MatrixView, SplitMix64, SymmetricEigen, ThinQr, product_by_columns, symmetric_product, transposed};

/// A symmetric positive semidefinite matrix that is known by what it does to vectors.
pub trait SymmetricOperator: Sync {
    /// Number of rows and of columns.
    fn side(&self) -> usize;

    /// `block · G` for a row-major `[count, side]` block: the operator applied to each row.
    fn apply(&self, block: &[f64], count: usize, pool: &ThreadPool) -> Vec<f64>;
}

/// The leading eigenpairs of a [`SymmetricOperator`] from a block-Krylov space (Musco and Musco, arXiv 1504.05477).
#[derive(Clone, Debug)]
pub struct BlockKrylov {
    /// Ritz values, descending: none is larger than the eigenvalue of its place.
    pub values: Vec<f64>,
    /// `[rank, side]`: orthonormal rows, the vectors of the first values.
    pub vectors: Vec<f64>,
    /// How much larger the sum of the leading eigenvalues can be than that of the Ritz values: from the residuals
    /// `‖G v − θ v‖` of the vectors.
    pub excess: f64,
    /// How often the operator was applied to a block.
    pub applications: usize,
    /// Whether that was enough.
    pub sufficient: bool,
}

impl BlockKrylov {
    /// Vectors of a block beyond the rank, as a share of it and at least this many: what the space needs to hold the
    /// directions at the edge.
    const EXTRA: usize = 16;
    /// Most blocks of a space.
    const BLOCKS: usize = 8;
    /// How often a full space begins anew.
    pub const RESTARTS: usize = 2;

    /// Vectors of a block for that rank.
    pub fn block_size(side: usize, rank: usize) -> usize {
        rank.saturating_add(Self::EXTRA.max(rank / 4)).min(side)
    }

    /// Bytes that the largest space takes: basis, images on their way, coordinates.
    pub fn working_bytes(side: usize, rank: usize) -> u64 {
        let (size, side) = (Self::block_size(side, rank) as u64, side as u64);
        let dimension = Self::BLOCKS as u64 * size;
        8 * (side * (dimension + 8 * size) + 4 * dimension * dimension)
    }

    /// Whether a space for that rank is small beside the whole: else a decomposition of everything costs less.
    pub fn pays(side: usize, rank: usize) -> bool {
        side >= 128 && Self::block_size(side, rank).saturating_mul(5) <= side
    }

    /// The first `rank` eigenpairs. The space grows until `enough(captured, excess)` holds for the sum of the leading
    /// Ritz values and what it may be short of. One that has as many blocks as may be begins anew from its leading
    /// vectors, in the same memory; after the last time [`BlockKrylov::sufficient`] says that it never held.
    ///
    /// The start is the same for every matrix of a size. All blocks of the space are kept and orthogonalized twice.
    ///
    /// # Errors
    /// `ERR_SOLVER_FAILED` when the operator gives values that are not finite.
    pub fn new(
        operator: &dyn SymmetricOperator,
        rank: usize,
        restarts: usize,
        enough: impl Fn(f64, f64) -> bool,
        pool: &ThreadPool,
    ) -> Result<Self> {
        let side = operator.side();
        let size = Self::block_size(side, rank);
        let rank = rank.min(size);
        let mut random = SplitMix64::new(0x6b72_796c);
        let start: Vec<f64> = (0..size * side).map(|_| normal(&mut random)).collect();
        let (mut first, _) = orthonormal_rows(operator.apply(&start, size, pool), size, side, pool);
        let blocks = Self::BLOCKS.min(side / size).max(1);
        let mut applications = 1;
        for restart in 0..=restarts {
            let mut space = Space { side, size, basis: first, projected: Vec::new(), dropped: 0.0 };
            first = Vec::new();
            for block in 1..=blocks {
                let image = operator.apply(&space.basis[(block - 1) * size * side..], size, pool);
                applications += 1;
                let rest = space.project(image, pool);
                let (mut next, remainder) = orthonormal_rows(rest, size, side, pool);
                // The space of one block is the subspace iteration, too coarse to look at.
                if block > 1 || block == blocks {
                    let ritz = SymmetricEigen::new(&space.matrix(), space.dimension())?;
                    let excess = space.excess(&ritz, &remainder, rank)?;
                    let sufficient = enough(ritz.values[..rank].iter().sum(), excess);
                    if sufficient || (block == blocks && restart == restarts) {
                        let vectors = space.vectors(&ritz, rank, pool);
                        return Ok(BlockKrylov { values: ritz.values, vectors, excess, applications, sufficient });
                    }
                    if block == blocks {
                        first = space.vectors(&ritz, size, pool);
                        break;
                    }
                }
                space.drop_known(&mut next, &remainder, pool);
                space.basis.extend(next);
            }
        }
        unreachable!("the last block of the last space is returned")
    }
}

/// What was built of a Krylov space.
struct Space {
    side: usize,
    /// Vectors of a block.
    size: usize,
    /// Orthonormal rows, `[blocks · size, side]`.
    basis: Vec<f64>,
    /// Row-major `[(i + 1) · size, size]` for block `i`: the basis up to that block times its image.
    projected: Vec<Vec<f64>>,
    /// Squared norm of what was left out of the space.
    dropped: f64,
}

impl Space {
    /// Largest part of a unit vector inside of the space that is rounding.
    const ORTHOGONAL: f64 = 1e-12;

    /// Number of basis vectors whose image is known.
    fn dimension(&self) -> usize {
        self.projected.len() * self.size
    }

    /// Takes what the operator made of the last block; gives the part outside of the space, `[size, side]`.
    fn project(&mut self, image: Vec<f64>, pool: &ThreadPool) -> Vec<f64> {
        let (side, size) = (self.side, self.size);
        let count = self.basis.len() / side;
        let basis = MatrixView::new(&self.basis, count, side);
        let mut rest = image;
        let mut sum = vec![0.0; count * size];
        for _ in 0..2 {
            // [size, count]: the image against the basis.
            let inside = product_by_columns(MatrixView::new(&rest, size, side), basis.transposed(), pool);
            let part = product_by_columns(MatrixView::new(&inside, size, count), basis, pool);
            rest.iter_mut().zip(part).for_each(|(rest, part)| *rest -= part);
            for (at, value) in sum.iter_mut().enumerate() {
                *value += inside[at % size * count + at / size];
            }
        }
        self.projected.push(sum);
        rest
    }

    /// Makes those rows of a new block zero that are not orthogonal to the space: nothing new was left for them but
    /// rounding noise. What they stood for counts in every residual from then on.
    fn drop_known(&mut self, rows: &mut [f64], remainder: &[f64], pool: &ThreadPool) {
        let (side, count) = (self.side, self.basis.len() / self.side);
        let basis = MatrixView::new(&self.basis, count, side);
        let inside = product_by_columns(MatrixView::new(rows, self.size, side), basis.transposed(), pool);
        for (index, (row, inside)) in rows.chunks_exact_mut(side).zip(inside.chunks_exact(count)).enumerate() {
            if inside.iter().map(|value| value * value).sum::<f64>().sqrt() > Self::ORTHOGONAL {
                row.fill(0.0);
                self.dropped += remainder.iter().skip(index).step_by(self.size).map(|part| part * part).sum::<f64>();
            }
        }
    }

    /// The operator in the coordinates of the basis.
    fn matrix(&self) -> Vec<f64> {
        let (size, dimension) = (self.size, self.dimension());
        let mut matrix = vec![0.0; dimension * dimension];
        for (block, projected) in self.projected.iter().enumerate() {
            for (row, values) in projected.chunks_exact(size).enumerate() {
                for (column, &value) in values.iter().enumerate() {
                    let column = block * size + column;
                    // On the diagonal block both halves were computed; one is taken.
                    if row <= column {
                        matrix[row * dimension + column] = value;
                        matrix[column * dimension + row] = value;
                    }
                }
            }
        }
        matrix
    }

    /// An upper estimate of what the leading eigenvalues have beyond the Ritz values.
    ///
    /// The residual of a Ritz vector is what the last block of its coordinates makes outside of the space. An
    /// eigenvalue lies no further from its Ritz value than the norm ρ of the residual, and no further than `ρ² / gap`
    /// where a gap separates it from what is outside: of the leading vectors, for the edge of which the next Ritz value
    /// and its residual stand, or of the space, see [`Space::outside`]. An estimate: an eigenvector that the start has
    /// nothing of is not seen.
    fn excess(&self, ritz: &SymmetricEigen, remainder: &[f64], rank: usize) -> Result<f64> {
        let (size, dimension) = (self.size, self.dimension());
        let squares = |place: usize| {
            let last = &ritz.vectors[(place + 1) * dimension - size..(place + 1) * dimension];
            let mut squares = self.dropped;
            for column in 0..size {
                let part: f64 = (0..size).map(|row| last[row] * remainder[row * size + column]).sum();
                squares += part * part;
            }
            squares
        };
        let next = rank.min(dimension - 1);
        let edge = (ritz.values[next].max(0.0) + squares(next).sqrt()).min(self.outside(remainder)?);
        let of_vector = |place: usize| {
            let squares = squares(place);
            let (residual, gap) = (squares.sqrt(), ritz.values[place] - edge);
            if gap > residual { squares / gap } else { residual }
        };
        Ok((0..rank).map(of_vector).sum())
    }

    /// An estimate of the largest eigenvalue of the operator outside of the space, which is block tridiagonal as what is
    /// inside: it has the largest eigenvalue of a block, and couplings on both sides of it. Those of the last block stand
    /// for the rest, for blocks hold less the later they come.
    fn outside(&self, remainder: &[f64]) -> Result<f64> {
        let size = self.size;
        let last: Vec<f64> = self.projected.last().map_or_else(Vec::new, |all| all[all.len() - size * size..].to_vec());
        let symmetric = |at: usize| (last[at] + last[at % size * size + at / size]) / 2.0;
        let own = SymmetricEigen::new(&(0..size * size).map(symmetric).collect::<Vec<f64>>(), size)?;
        // [size, size], the rows of the image against the next block.
        let dot = |i: usize, j: usize| -> f64 {
            let row = |k: usize| remainder[k * size..(k + 1) * size].iter();
            row(i).zip(row(j)).map(|(a, b)| a * b).sum()
        };
        let gram: Vec<f64> = (0..size * size).map(|at| dot(at / size, at % size)).collect();
        let coupling = SymmetricEigen::new(&gram, size)?;
        Ok(own.values[0].max(0.0) + 2.0 * (coupling.values[0].max(0.0) + self.dropped).sqrt())
    }

    /// The first Ritz vectors, `[rank, side]`.
    fn vectors(&self, ritz: &SymmetricEigen, rank: usize, pool: &ThreadPool) -> Vec<f64> {
        let dimension = self.dimension();
        let coordinates = MatrixView::new(&ritz.vectors[..rank * dimension], rank, dimension);
        let basis = &self.basis[..dimension * self.side];
        product_by_columns(coordinates, MatrixView::new(basis, dimension, self.side), pool)
    }
}

/// Orthonormal rows that span those of a `[count, side]` matrix, and the lower triangular `[count, count]` matrix that
/// makes it of them.
fn orthonormal_rows(rows: Vec<f64>, count: usize, side: usize, pool: &ThreadPool) -> (Vec<f64>, Vec<f64>) {
    if let Some(found) = by_cholesky(&rows, count, side, pool) {
        return found;
    }
    let qr = ThinQr::new(&transposed(&rows, count, side), side, count);
    (transposed(&qr.q, side, count), transposed(&qr.r, count, count))
}

/// The same by the Cholesky factor of the Gram matrix, twice (CholeskyQR2, Yamamoto et al., ETNA 44, 2015): nearly all of
/// it products, which every thread takes part in. `None` where the rows are too dependent for that.
fn by_cholesky(rows: &[f64], count: usize, side: usize, pool: &ThreadPool) -> Option<(Vec<f64>, Vec<f64>)> {
    let (mut basis, mut factor) = (rows.to_vec(), Vec::new());
    for round in 0..2 {
        let view = MatrixView::new(&basis, count, side);
        let mut gram = vec![0.0; count * count];
        symmetric_product(view, view.transposed(), &mut gram, pool);
        // The second round mends what roundings of the first have left, if that is little.
        let is_near = |(at, &value): (usize, &f64)| (value - f64::from(u8::from(at % (count + 1) == 0))).abs() < 0.1;
        if round == 1 && !gram.iter().enumerate().all(is_near) {
            return None;
        }
        let lower = lower_cholesky(&gram, count)?;
        solve_lower_by_columns(&lower, count, &mut basis, side, pool);
        factor = if round == 0 {
            lower
        } else {
            product_by_columns(MatrixView::new(&factor, count, count), MatrixView::new(&lower, count, count), pool)
        };
    }
    Some((basis, factor))
}

/// The lower triangular `[n, n]` factor L of `G = L Lᵀ`; `None` where a row has less than 1e-8 of its square outside of
/// those before it, or is not finite.
fn lower_cholesky(gram: &[f64], n: usize) -> Option<Vec<f64>> {
    const INDEPENDENT: f64 = 1e-8;
    let mut lower = vec![0.0; n * n];
    for i in 0..n {
        let (above, row) = lower.split_at_mut(i * n);
        for j in 0..i {
            let known: f64 = row[..j].iter().zip(&above[j * n..j * n + j]).map(|(a, b)| a * b).sum();
            row[j] = (gram[i * n + j] - known) / above[j * (n + 1)];
        }
        let own = gram[i * (n + 1)];
        let pivot = own - row[..i].iter().map(|value| value * value).sum::<f64>();
        // NaN fails, too.
        if !(own.is_finite() && pivot > INDEPENDENT * own) {
            return None;
        }
        row[i] = pivot.sqrt();
    }
    Some(lower)
}

/// Standard normal, as the sum of twelve.
fn normal(random: &mut SplitMix64) -> f64 {
    (0..12).map(|_| random.uniform()).sum::<f64>() - 6.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::product;

    /// A matrix with known eigenvalues, through reflections.
    struct Known {
        matrix: Vec<f64>,
        values: Vec<f64>,
    }

    impl Known {
        fn new(values: Vec<f64>) -> Self {
            let n = values.len();
            let mut matrix: Vec<f64> =
                (0..n * n).map(|at| if at % (n + 1) == 0 { values[at / n] } else { 0.0 }).collect();
            let mut random = SplitMix64::new(n as u64);
            for _ in 0..3 {
                let v: Vec<f64> = (0..n).map(|_| normal(&mut random)).collect();
                let norm: f64 = v.iter().map(|v| v * v).sum();
                let reflect = |matrix: &mut [f64]| {
                    for row in matrix.chunks_exact_mut(n) {
                        let dot: f64 = row.iter().zip(&v).map(|(a, b)| a * b).sum();
                        row.iter_mut().zip(&v).for_each(|(a, b)| *a -= 2.0 * dot * b / norm);
                    }
                };
                reflect(&mut matrix);
                matrix = transposed(&matrix, n, n);
                reflect(&mut matrix);
            }
            Known { matrix, values }
        }
    }

    impl SymmetricOperator for Known {
        fn side(&self) -> usize {
            self.values.len()
        }

        fn apply(&self, block: &[f64], count: usize, pool: &ThreadPool) -> Vec<f64> {
            let n = self.side();
            let mut out = vec![0.0; count * n];
            product(MatrixView::new(block, count, n), MatrixView::new(&self.matrix, n, n), &mut out, pool);
            out
        }
    }

    fn spectra(n: usize) -> Vec<(&'static str, Vec<f64>)> {
        vec![
            ("steep", (0..n).map(|i| 0.8f64.powi(i as i32)).collect()),
            ("power law", (1..=n).map(|i| (i as f64).powf(-1.5)).collect()),
            ("slow", (1..=n).map(|i| (i as f64).powf(-0.3)).collect()),
            ("one giant", (0..n).map(|i| if i == 0 { 1e10 } else { 1.0 / (1.0 + i as f64) }).collect()),
            ("flat", vec![1.0; n]),
            (
                "cluster",
                (0..n)
                    .map(|i| {
                        if i < 7 {
                            2.0
                        } else if i < 27 {
                            1.0001
                        } else {
                            1.0
                        }
                    })
                    .collect(),
            ),
            ("gap before many", (0..n).map(|i| if i < 32 { 1.05 } else { 1.0 - (i - 32) as f64 / n as f64 }).collect()),
            ("low rank", (0..n).map(|i| if i < 11 { 1.0 + i as f64 } else { 0.0 }).rev().collect()),
        ]
    }

    #[test]
    fn what_is_missing_is_never_more_than_the_estimate() {
        let pool = ThreadPool::with_threads(2);
        let n = 400;
        for (name, values) in spectra(n) {
            let mut sorted = values.clone();
            sorted.sort_by(|a, b| b.total_cmp(a));
            let total: f64 = sorted.iter().sum();
            let operator = Known::new(values);
            for rank in [1, 8, 32] {
                let best: f64 = sorted[..rank].iter().sum();
                // Every size of the space, one after another.
                for blocks in 2..=BlockKrylov::BLOCKS {
                    let looked = std::sync::atomic::AtomicUsize::new(1);
                    let enough = |captured: f64, excess: f64| {
                        let missing = best - captured;
                        assert!(missing <= excess + 1e-13 * total, "{name} {rank}: {missing:e} and {excess:e}");
                        assert!(missing >= -1e-12 * total, "{name} {rank}: more than there is");
                        looked.fetch_add(1, std::sync::atomic::Ordering::Relaxed) + 1 == blocks
                    };
                    let found = BlockKrylov::new(&operator, rank, BlockKrylov::RESTARTS, enough, &pool).unwrap();
                    assert!(found.sufficient);
                    assert_eq!(found.applications, blocks + 1);
                    check_vectors(&operator, &found, rank, &pool);
                }
            }
        }
    }

    fn check_vectors(operator: &Known, found: &BlockKrylov, rank: usize, pool: &ThreadPool) {
        let n = operator.side();
        let image = operator.apply(&found.vectors, rank, pool);
        // Beyond the rank of the matrix there is nothing to find.
        let rank = found.values[..rank].iter().take_while(|&&value| value > 1e-12 * found.values[0]).count();
        for i in 0..rank {
            for j in 0..rank {
                let dot = |a: &[f64]| -> f64 {
                    a[i * n..(i + 1) * n].iter().zip(&found.vectors[j * n..(j + 1) * n]).map(|(a, b)| a * b).sum()
                };
                assert!((dot(&found.vectors) - f64::from(u8::from(i == j))).abs() < 1e-11);
                let expected = if i == j { found.values[i] } else { 0.0 };
                assert!((dot(&image) - expected).abs() <= 1e-11 * found.values[0]);
            }
        }
    }

    #[test]
    fn a_few_blocks_find_what_a_real_spectrum_has() {
        let pool = ThreadPool::with_threads(2);
        let n = 600;
        let values: Vec<f64> = (1..=n).map(|i| (i as f64).powf(-1.2)).collect();
        let (rank, total) = (32, values.iter().sum::<f64>());
        let best: f64 = values[..rank].iter().sum();
        let enough = |captured: f64, excess: f64| excess <= 2e-4 * (total - captured);
        let found = BlockKrylov::new(&Known::new(values), rank, 0, enough, &pool).unwrap();
        let captured: f64 = found.values[..rank].iter().sum();
        assert!(((total - captured) / (total - best)).sqrt() <= 1.0 + 1e-4);
        assert!(found.applications <= 5, "{}", found.applications);
    }

    #[test]
    fn a_full_space_begins_anew_from_what_it_has_found() {
        let pool = ThreadPool::with_threads(2);
        let n = 500;
        let values: Vec<f64> = (1..=n).map(|i| (i as f64).powf(-0.05)).collect();
        let (rank, best) = (8, values[..8].iter().sum::<f64>());
        let operator = Known::new(values);
        let found =
            BlockKrylov::new(&operator, rank, BlockKrylov::RESTARTS, |_, excess| excess <= 1e-9, &pool).unwrap();
        assert!(
            found.sufficient && found.applications > BlockKrylov::BLOCKS + 1,
            "{} {:e}",
            found.applications,
            found.excess
        );
        assert!((found.values[..rank].iter().sum::<f64>() - best).abs() <= 1e-9 + 1e-12 * best);
        check_vectors(&operator, &found, rank, &pool);
        let never = BlockKrylov::new(&operator, rank, BlockKrylov::RESTARTS, |_, _| false, &pool).unwrap();
        assert!(!never.sufficient && never.excess <= 1e-9);
        assert_eq!(never.applications, 1 + (1 + BlockKrylov::RESTARTS) * BlockKrylov::BLOCKS);
    }

    #[test]
    fn rows_become_orthonormal_however_dependent_they_are() {
        let pool = ThreadPool::with_threads(2);
        let (count, side) = (30, 700);
        let mut random = SplitMix64::new(4);
        let independent: Vec<f64> = (0..count * side).map(|_| normal(&mut random)).collect();
        let mixed = |share: f64| -> Vec<f64> {
            let value = |at: usize| independent[at % side] + share * independent[at];
            (0..count * side).map(|at| value(at) * 10f64.powi((at / side % 7) as i32 - 3)).collect()
        };
        // Kahan's rows: none is near those before it, all together are dependent.
        let kahan: Vec<f64> = (0..count * side)
            .map(|at| {
                let (i, j) = (at / side, at % side);
                let (s, c) = (0.3f64, (1.0 - 0.09f64).sqrt());
                s.powi(j as i32)
                    * if i == j {
                        1.0
                    } else if j < i && j < count {
                        -c
                    } else {
                        0.0
                    }
            })
            .collect();
        let (basis, _) = orthonormal_rows(kahan, count, side, &pool);
        for (i, j) in (0..count).flat_map(|i| (0..=i).map(move |j| (i, j))) {
            let dot: f64 = (0..side).map(|k| basis[i * side + k] * basis[j * side + k]).sum();
            assert!((dot - f64::from(u8::from(i == j))).abs() < 1e-13, "{i} {j} {dot}");
        }
        for (share, by_products) in [(1.0, true), (1e-3, true), (1e-6, false), (0.0, false)] {
            let rows = mixed(share);
            assert_eq!(by_cholesky(&rows, count, side, &pool).is_some(), by_products, "{share}");
            let (basis, factor) = orthonormal_rows(rows.clone(), count, side, &pool);
            for i in 0..count {
                let row = |of: &[f64], i: usize| of[i * side..(i + 1) * side].to_vec();
                let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
                for j in 0..=i {
                    let expected = if i == j { 1.0 } else { 0.0 };
                    assert!((dot(&row(&basis, i), &row(&basis, j)) - expected).abs() < 1e-13, "{share} {i} {j}");
                    assert!(i == j || factor[j * count + i] == 0.0, "{share}: it is lower triangular");
                }
                let norm = dot(&row(&rows, i), &row(&rows, i)).sqrt();
                for column in (0..side).step_by(13) {
                    let made: f64 = (0..count).map(|l| factor[i * count + l] * basis[l * side + column]).sum();
                    assert!((made - rows[i * side + column]).abs() <= 1e-13 * norm, "{share} {i}");
                }
            }
        }
    }

    #[test]
    fn threads_do_not_change_a_bit() {
        let values: Vec<f64> = (1..=300).map(|i| 1.0 / f64::from(i)).collect();
        let operator = Known::new(values);
        let run = |threads| {
            let pool = ThreadPool::with_threads(threads);
            BlockKrylov::new(&operator, 10, BlockKrylov::RESTARTS, |_, excess| excess < 1e-6, &pool).unwrap().vectors
        };
        assert_eq!(run(1), run(3));
    }

    #[test]
    fn a_zero_operator_and_a_broken_one() {
        let pool = ThreadPool::with_threads(1);
        let zero = Known { matrix: vec![0.0; 300 * 300], values: vec![0.0; 300] };
        let found = BlockKrylov::new(&zero, 4, 0, |_, excess| excess == 0.0, &pool).unwrap();
        assert!(found.values.iter().all(|&value| value == 0.0));
        let broken = Known { matrix: vec![f64::NAN; 300 * 300], values: vec![0.0; 300] };
        let error = BlockKrylov::new(&broken, 4, 0, |_, _| false, &pool).unwrap_err();
        assert_eq!(error.code, kintsugi_runtime::ErrorCode::SolverFailed);
    }
}
