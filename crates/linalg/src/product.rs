use faer::Accum;
use kintsugi_runtime::ThreadPool;

use crate::block_product::multiply;
use crate::{MatrixView, MatrixViewMut, Scalar, UpperTriangle};

/// Rows of a result that one task computes. Fixed, so that the cut never depends on the threads; 64 rows repay the
/// packing of the right operand and still give a 256-row matrix four tasks.
const BAND: usize = 64;

/// Rows of a quadratic form that one task computes, where there are many: each reads all of S.
const FORM_BAND: usize = 256;

/// `out = a · b`; `out` is row-major `[a.rows, b.columns]`.
///
/// # Panics
/// When the shapes do not fit.
pub fn product<T: Scalar>(a: MatrixView<'_, T>, b: MatrixView<'_, T>, out: &mut [T], pool: &ThreadPool) {
    let (rows, columns) = (a.rows(), b.columns());
    assert_eq!(a.columns(), b.rows(), "the inner sizes of a product must agree");
    assert_eq!(out.len(), rows * columns, "the result is [a.rows, b.columns]");
    pool.for_each_chunk(out, BAND * columns, |index, band| {
        let height = band.len() / columns;
        let a = a.row_range(index * BAND..index * BAND + height);
        let band = MatrixViewMut::new(band, height, columns);
        multiply(band.0, Accum::Replace, a.0, b.0, T::ONE);
    });
}

/// `out = a · b` where the caller knows that the result is symmetric, as in `(Δ S) · Δᵀ`: half the work of
/// [`product`], and exactly symmetric.
///
/// # Panics
/// When the shapes do not fit or the result is not square.
pub fn symmetric_product(a: MatrixView<'_, f64>, b: MatrixView<'_, f64>, out: &mut [f64], pool: &ThreadPool) {
    let n = a.rows();
    assert_eq!(a.columns(), b.rows(), "the inner sizes of a product must agree");
    assert_eq!((b.columns(), out.len()), (n, n * n), "a symmetric result is square");
    pool.for_each_chunk(out, BAND * n, |index, band| {
        let first = index * BAND;
        let height = band.len() / n;
        let band = MatrixViewMut::new(band, height, n).column_range(first..n);
        let (a, b) = (a.row_range(first..first + height), b.column_range(first..n));
        multiply(band.0, Accum::Replace, a.0, b.0, 1.0);
    });
    mirror_upper_triangle(out, n);
}

/// `sum += weight · Xᵀ X` for rows of f32: products and sums in f64. `x` is `[rows, n]`.
///
/// A product of two f32 is exact in f64. With products in f32 the directions that hold less than a millionth of the
/// energy of the largest would be rounding noise, and activations with outliers have such directions.
///
/// # Panics
/// When the shapes do not fit.
pub fn accumulate_gram(x: &[f32], weight: f64, sum: &mut UpperTriangle<f64>, pool: &ThreadPool) {
    let n = sum.side();
    if n == 0 || x.is_empty() {
        return;
    }
    let wide: Vec<f64> = x.iter().map(|&value| f64::from(value)).collect();
    let x = MatrixView::new(&wide, x.len() / n, n);
    pool.for_each_chunk(&mut sum.parts_mut(BAND), 1, |_, part| {
        let part = &mut part[0];
        let (first, height) = (part.first, part.height());
        let left = x.column_range(first..first + height).transposed();
        multiply(part.columns(first..n).0, Accum::Add, left.0, x.column_range(first..n).0, weight);
    });
}

/// `sum += weight · Xᵀ Y` for rows of f32 in pairs: products and sums in f64, as in [`accumulate_gram`]. `x` and `y` are
/// `[rows, n]`, `sum` is row-major `[n, n]`.
///
/// # Panics
/// When the shapes do not fit.
pub fn accumulate_cross(x: &[f32], y: &[f32], weight: f64, sum: &mut [f64], n: usize, pool: &ThreadPool) {
    assert_eq!((x.len(), sum.len()), (y.len(), n * n), "rows come in pairs, the sum is [n, n]");
    if n == 0 || x.is_empty() {
        return;
    }
    let wide = |values: &[f32]| values.iter().map(|&value| f64::from(value)).collect::<Vec<f64>>();
    let (x_wide, y_wide) = (wide(x), wide(y));
    let (x, y) = (MatrixView::new(&x_wide, x.len() / n, n), MatrixView::new(&y_wide, y.len() / n, n));
    pool.for_each_chunk(sum, BAND * n, |index, band| {
        let (first, height) = (index * BAND, band.len() / n);
        let left = x.column_range(first..first + height).transposed();
        multiply(MatrixViewMut::new(band, height, n).0, Accum::Add, left.0, y.0, weight);
    });
}

/// Copies the upper triangle of a square `[n, n]` matrix over the lower one.
pub(crate) fn mirror_upper_triangle(values: &mut [f64], n: usize) {
    assert_eq!(values.len(), n * n, "the matrix is [n, n]");
    for i in 1..n {
        let (above, below) = values.split_at_mut(i * n);
        for j in 0..i {
            below[j] = above[j * n + i];
        }
    }
}

/// `out = M S` for a symmetric S; `out` is row-major `[M.rows, n]`.
///
/// # Panics
/// When the shapes do not fit.
pub fn times_symmetric(m: MatrixView<'_, f64>, s: &UpperTriangle<f64>, out: &mut [f64], pool: &ThreadPool) {
    let n = s.side();
    assert_eq!((m.columns(), out.len()), (n, m.rows() * n), "the result is [M.rows, n]");
    pool.for_each_chunk(out, BAND * n.max(1), |index, band| {
        let height = band.len() / n;
        let m = m.row_range(index * BAND..index * BAND + height);
        band.fill(0.0);
        for (first, rows, block, right) in bands_of(s) {
            let (own, behind) = (first..first + rows, first + rows..n);
            let mut add = |columns, left: MatrixView<'_, f64>, right: MatrixView<'_, f64>| {
                add_product(MatrixViewMut::new(band, height, n).column_range(columns), left, right);
            };
            add(own.clone(), m.column_range(own.clone()), MatrixView::new(&block, rows, rows));
            add(own.clone(), m.column_range(own.clone()), MatrixView::new(&block, rows, rows).transposed());
            add(own.clone(), m.column_range(behind.clone()), right.transposed());
            add(behind, m.column_range(own), right);
        }
    });
}

/// `tr(M S Mᵀ)`: the energy `‖M X‖²` of the outputs of M on inputs with second moment `S = X Xᵀ`.
///
/// # Panics
/// When the shapes do not fit.
pub fn quadratic_trace(m: MatrixView<'_, f64>, s: &UpperTriangle<f64>, pool: &ThreadPool) -> f64 {
    assert_eq!(m.columns(), s.side(), "M has a column per row of S");
    let fill = |i: usize, row: &mut [f64]| row.iter_mut().enumerate().for_each(|(j, value)| *value = m.0[(i, j)]);
    quadratic_trace_of(m.rows(), fill, s, pool)
}

/// [`quadratic_trace`] of a matrix of `rows` rows that is never whole in memory: `fill(i, row)` writes row `i`.
pub fn quadratic_trace_of(
    rows: usize,
    fill: impl Fn(usize, &mut [f64]) + Sync + Send,
    s: &UpperTriangle<f64>,
    pool: &ThreadPool,
) -> f64 {
    // S is positive semidefinite; what rounding leaves below zero is zero.
    quadratic_forms(rows, fill, s, pool).iter().sum::<f64>().max(0.0)
}

/// `m S mᵀ` of each of `rows` rows m, which `fill(i, row)` writes: the diagonal of `M S Mᵀ`. Products in the type of the
/// matrices, sums over a row in f64.
pub fn quadratic_forms<T: Scalar>(
    rows: usize,
    fill: impl Fn(usize, &mut [T]) + Sync + Send,
    s: &UpperTriangle<T>,
    pool: &ThreadPool,
) -> Vec<f64> {
    let n = s.side();
    if n == 0 {
        return vec![0.0; rows];
    }
    let size = if rows >= 16 * FORM_BAND { FORM_BAND } else { BAND };
    let bands = pool.map(rows.div_ceil(size), |index| {
        let height = size.min(rows - index * size);
        let mut band = vec![T::ZERO; height * n];
        band.chunks_exact_mut(n).enumerate().for_each(|(row, values)| fill(index * size + row, values));
        let mut weighted = vec![T::ZERO; height * n];
        let view = MatrixView::new(&band, height, n);
        for (first, rows, block, right) in bands_of(s) {
            let (own, behind) = (view.column_range(first..first + rows), first + rows..n);
            let mut add = |columns, right: MatrixView<'_, T>| {
                add_product(MatrixViewMut::new(&mut weighted, height, n).column_range(columns), own, right);
            };
            add(first..first + rows, MatrixView::new(&block, rows, rows));
            add(behind, right);
        }
        // Every pair of columns was counted once, the diagonal half.
        let of_row = |(weighted, values): (&[T], &[T])| {
            2.0 * weighted.iter().zip(values).map(|(weighted, value)| weighted.wide() * value.wide()).sum::<f64>()
        };
        weighted.chunks_exact(n).zip(band.chunks_exact(n)).map(of_row).collect::<Vec<f64>>()
    });
    bands.concat()
}

/// The bands of a symmetric matrix: first row, rows, the block on the diagonal as the upper triangular matrix that,
/// added to its transpose, gives the block, and what lies right of it.
fn bands_of<T: Scalar>(s: &UpperTriangle<T>) -> impl Iterator<Item = (usize, usize, Vec<T>, MatrixView<'_, T>)> {
    (0..s.bands()).map(move |index| {
        let (first, band) = s.band(index);
        let rows = band.rows();
        let mut block = vec![T::ZERO; rows * rows];
        for (i, block) in block.chunks_exact_mut(rows).enumerate() {
            block[i..].copy_from_slice(&s.row(first + i)[..rows - i]);
            block[i] = block[i].halved();
        }
        (first, rows, block, band.column_range(rows..band.columns()))
    })
}

/// `out −= a · b`; `out` is row-major `[a.rows, b.columns]`.
///
/// # Panics
/// When the shapes do not fit.
pub fn subtract_product(a: MatrixView<'_, f64>, b: MatrixView<'_, f64>, out: &mut [f64], pool: &ThreadPool) {
    let columns = b.columns();
    assert_eq!(a.columns(), b.rows(), "the inner sizes of a product must agree");
    assert_eq!(out.len(), a.rows() * columns, "the result is [a.rows, b.columns]");
    pool.for_each_chunk(out, BAND * columns.max(1), |index, band| {
        let height = band.len() / columns;
        let a = a.row_range(index * BAND..index * BAND + height);
        multiply(MatrixViewMut::new(band, height, columns).0, Accum::Add, a.0, b.0, -1.0);
    });
}

/// `out += a · b`, in the calling task.
///
/// # Panics
/// When the shapes do not fit.
pub fn add_product<T: Scalar>(out: MatrixViewMut<'_, T>, a: MatrixView<'_, T>, b: MatrixView<'_, T>) {
    multiply(out.0, Accum::Add, a.0, b.0, T::ONE);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Small integers: every product below is exact in f32 and f64.
    fn integers(count: usize, seed: usize) -> Vec<f64> {
        (0..count).map(|i| (((i + seed) * 7919 + (i * i) % 31) % 17) as f64 - 8.0).collect()
    }

    fn naive(a: MatrixView<'_, f64>, b: MatrixView<'_, f64>) -> Vec<f64> {
        let mut out = Vec::new();
        for i in 0..a.rows() {
            for j in 0..b.columns() {
                out.push((0..a.columns()).map(|l| a.0[(i, l)] * b.0[(l, j)]).sum());
            }
        }
        out
    }

    #[test]
    fn products_of_ragged_shapes_are_exact_on_integers() {
        let pool = ThreadPool::with_threads(2);
        for (m, k, n) in [(1, 1, 1), (3, 5, 2), (64, 64, 64), (65, 3, 130), (129, 70, 1), (2, 200, 66)] {
            let (a, b) = (integers(m * k, 1), integers(k * n, 2));
            let (a, b) = (MatrixView::new(&a, m, k), MatrixView::new(&b, k, n));
            let mut out = vec![f64::NAN; m * n];
            product(a, b, &mut out, &pool);
            assert_eq!(out, naive(a, b), "{m}×{k}×{n}");
            let mut transposed = vec![f64::NAN; m * n];
            product(b.transposed(), a.transposed(), &mut transposed, &pool);
            let transposed = MatrixView::new(&transposed, n, m).transposed();
            assert_eq!(naive(transposed, MatrixView::new(&identity(n), n, n)), out);
        }
    }

    fn identity(n: usize) -> Vec<f64> {
        (0..n * n).map(|i| f64::from(u8::from(i % (n + 1) == 0))).collect()
    }

    #[test]
    fn symmetric_product_and_trace_agree_with_the_full_product() {
        let pool = ThreadPool::with_threads(2);
        for (m, k) in [(1, 1), (5, 9), (70, 33), (130, 64), (66, 300), (3, 530)] {
            let (delta, x) = (integers(m * k, 3), integers(k * 20, 4));
            let (delta, x) = (MatrixView::new(&delta, m, k), MatrixView::new(&x, 20, k));
            let s = naive(x.transposed(), x);
            let weighted = naive(delta, MatrixView::new(&s, k, k));
            let weighted = MatrixView::new(&weighted, m, k);
            let mut out = vec![f64::NAN; m * m];
            symmetric_product(weighted, delta.transposed(), &mut out, &pool);
            assert_eq!(out, naive(weighted, delta.transposed()));
            let trace: f64 = (0..m).map(|i| out[i * m + i]).sum();
            let s = UpperTriangle::of(&s, k);
            assert_eq!(quadratic_trace(delta, &s, &pool), trace);
            let mut again = vec![f64::NAN; m * k];
            times_symmetric(delta, &s, &mut again, &pool);
            assert_eq!(MatrixView::new(&again, m, k).0, weighted.0);
            subtract_product(weighted, delta.transposed(), &mut out, &pool);
            assert_eq!(out, vec![0.0; m * m]);
        }
    }

    #[test]
    fn gram_adds_and_survives_values_whose_squares_leave_f32() {
        let pool = ThreadPool::with_threads(2);
        let n = 267;
        let powers: Vec<f32> = (0..n).map(|j| [1.0, 1e30, 1e-30, 1e5][j % 4]).collect();
        let x: Vec<f32> = integers(20 * n, 5).iter().enumerate().map(|(i, &v)| v as f32 * powers[i % n]).collect();
        let mut sum = UpperTriangle::zeros(n);
        accumulate_gram(&x, 1.0, &mut sum, &pool);
        accumulate_gram(&x, 1.0, &mut sum, &pool);
        for i in 0..n {
            for j in 0..n {
                let columns = || x.chunks_exact(n).map(|row| (f64::from(row[i]), f64::from(row[j])));
                let expected: f64 = columns().map(|(a, b)| 2.0 * a * b).sum();
                let size: f64 = columns().map(|(a, b)| 2.0 * (a * b).abs()).sum();
                assert!((sum.at(i, j) - expected).abs() <= 1e-14 * size, "{i} {j}");
            }
        }
    }

    #[test]
    fn cross_products_of_pairs_are_exact_on_integers_whatever_the_threads() {
        for (rows, n, weight) in [(1, 1, 1.0), (7, 65, 2.0), (513, 130, 0.5)] {
            let narrow = |seed| integers(rows * n, seed).iter().map(|&value| value as f32).collect::<Vec<f32>>();
            let (x, y) = (narrow(1), narrow(9));
            let expected: Vec<f64> = (0..n * n)
                .map(|at| {
                    let pairs = x.chunks_exact(n).zip(y.chunks_exact(n));
                    weight * pairs.map(|(x, y)| f64::from(x[at / n]) * f64::from(y[at % n])).sum::<f64>()
                })
                .collect();
            for threads in [1, 3] {
                let mut sum = vec![0.0; n * n];
                accumulate_cross(&x, &y, weight, &mut sum, n, &ThreadPool::with_threads(threads));
                assert!(sum == expected, "{rows} {n}");
            }
        }
    }

    #[test]
    fn gram_keeps_what_stands_beside_a_large_mean() {
        let pool = ThreadPool::with_threads(2);
        let (rows, n) = (512, 66);
        let noise = integers(rows * n, 7);
        let x: Vec<f32> = noise.iter().enumerate().map(|(i, v)| (1000 + i % n) as f32 + *v as f32 / 1024.0).collect();
        let mut sum = UpperTriangle::zeros(n);
        accumulate_gram(&x, 1.0, &mut sum, &pool);
        // The difference of two channels sees the noise alone; f32 sums of squares near 10⁶ would lose it.
        for (i, j) in [(0, 1), (5, 60), (64, 65)] {
            let offset = (j - i) as f64;
            let difference = |row: &[f32]| f64::from(row[j]) - f64::from(row[i]);
            let exact: f64 = x.chunks_exact(n).map(|row| (difference(row) - offset).powi(2)).sum();
            let mean: f64 = x.chunks_exact(n).map(|row| difference(row) - offset).sum();
            let quadratic = sum.at(i, i) + sum.at(j, j) - 2.0 * sum.at(i, j);
            let noise = quadratic - 2.0 * offset * mean - rows as f64 * offset * offset;
            assert!((noise - exact).abs() < 1e-6 * exact, "{noise} {exact}");
        }
    }

    #[test]
    fn add_product_touches_only_its_columns() {
        let mut out = vec![1.0f64; 3 * 5];
        let view = MatrixViewMut::new(&mut out, 3, 5).column_range(2..4);
        add_product(view, MatrixView::new(&[1.0, 2.0, 3.0], 3, 1), MatrixView::new(&[10.0, 100.0], 1, 2));
        assert_eq!(out[..5], [1.0, 1.0, 11.0, 101.0, 1.0]);
        assert_eq!(out[10..], [1.0, 1.0, 31.0, 301.0, 1.0]);
    }

    #[test]
    fn threads_do_not_change_a_bit() {
        let (m, k) = (150, 290);
        let a: Vec<f64> = (0..m * k).map(|i| (i as f64 * 0.7).sin()).collect();
        let x: Vec<f32> = (0..512 * k).map(|i| (i as f32 * 0.3).sin()).collect();
        let run = |threads| {
            let pool = ThreadPool::with_threads(threads);
            let a = MatrixView::new(&a, m, k);
            let mut gram = UpperTriangle::zeros(k);
            accumulate_gram(&x, 1.0, &mut gram, &pool);
            let mut weighted = vec![0.0; m * k];
            times_symmetric(a, &gram, &mut weighted, &pool);
            let mut outer = vec![0.0; m * m];
            symmetric_product(MatrixView::new(&weighted, m, k), a.transposed(), &mut outer, &pool);
            (quadratic_trace(a, &gram, &pool), gram, weighted, outer)
        };
        let one = run(1);
        assert_eq!(one, run(2));
        assert_eq!(one, run(5));
    }
}
