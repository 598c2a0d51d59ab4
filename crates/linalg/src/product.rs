use faer::linalg::matmul::matmul;
use faer::{Accum, Par};
use kintsugi_runtime::ThreadPool;

use crate::{MatrixView, MatrixViewMut, Scalar};

/// Rows of a result that one task computes. Fixed, so that the cut never depends on the threads; 64 rows repay the
/// packing of the right operand and still give a 256-row matrix four tasks.
const BAND: usize = 64;

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
        matmul(band.0, Accum::Replace, a.0, b.0, T::ONE, Par::Seq);
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
        matmul(band.0, Accum::Replace, a.0, b.0, 1.0, Par::Seq);
    });
    mirror_upper_triangle(out, n);
}

/// `sum += Xᵀ X`, upper triangle only, for rows of f32: products and sums in f64.
///
/// `x` is `[rows, n]`, `sum` is `[n, n]`. Everything on and above the diagonal is valid afterwards;
/// [`mirror_upper_triangle`] completes the matrix.
///
/// A product of two f32 is exact in f64. With products in f32 the directions that hold less than a millionth of the
/// energy of the largest would be rounding noise, and activations with outliers have such directions.
///
/// # Panics
/// When the shapes do not fit.
pub fn accumulate_gram(x: &[f32], n: usize, sum: &mut [f64], pool: &ThreadPool) {
    assert_eq!(sum.len(), n * n, "the sum is [n, n]");
    if n == 0 || x.is_empty() {
        return;
    }
    let wide: Vec<f64> = x.iter().map(|&value| f64::from(value)).collect();
    let x = MatrixView::new(&wide, x.len() / n, n);
    pool.for_each_chunk(sum, BAND * n, |index, band| {
        let first = index * BAND;
        let height = band.len() / n;
        let left = x.column_range(first..first + height).transposed();
        let out = MatrixViewMut::new(band, height, n).column_range(first..n);
        matmul(out.0, Accum::Add, left.0, x.column_range(first..n).0, 1.0, Par::Seq);
    });
}

/// Copies the upper triangle of a square `[n, n]` matrix over the lower one.
///
/// # Panics
/// When the matrix is not `[n, n]`.
pub fn mirror_upper_triangle(values: &mut [f64], n: usize) {
    assert_eq!(values.len(), n * n, "the matrix is [n, n]");
    for i in 1..n {
        let (above, below) = values.split_at_mut(i * n);
        for j in 0..i {
            below[j] = above[j * n + i];
        }
    }
}

/// `tr(M S Mᵀ)`: the energy `‖M X‖²` of the outputs of M on inputs with second moment `S = X Xᵀ`.
///
/// `s` is `[M.columns, M.columns]`, symmetric.
///
/// # Panics
/// When the shapes do not fit.
pub fn quadratic_trace(m: MatrixView<'_, f64>, s: &[f64], pool: &ThreadPool) -> f64 {
    let (rows, columns) = (m.rows(), m.columns());
    let s = MatrixView::new(s, columns, columns);
    let partial = pool.map(rows.div_ceil(BAND), |index| {
        let band = m.row_range(index * BAND..rows.min((index + 1) * BAND));
        let mut weighted = vec![0.0; band.rows() * columns];
        let out = MatrixViewMut::new(&mut weighted, band.rows(), columns);
        matmul(out.0, Accum::Replace, band.0, s.0, 1.0, Par::Seq);
        let mut sum = 0.0;
        for (i, weighted) in weighted.chunks_exact(columns.max(1)).enumerate() {
            sum += weighted.iter().enumerate().map(|(j, value)| value * band.0[(i, j)]).sum::<f64>();
        }
        sum
    });
    // S is positive semidefinite; what rounding leaves below zero is zero.
    partial.iter().sum::<f64>().max(0.0)
}

/// `out += a · b`, in the calling task.
///
/// # Panics
/// When the shapes do not fit.
pub fn add_product<T: Scalar>(out: MatrixViewMut<'_, T>, a: MatrixView<'_, T>, b: MatrixView<'_, T>) {
    matmul(out.0, Accum::Add, a.0, b.0, T::ONE, Par::Seq);
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
        for (m, k) in [(1, 1), (5, 9), (70, 33), (130, 64)] {
            let (delta, x) = (integers(m * k, 3), integers(k * 20, 4));
            let (delta, x) = (MatrixView::new(&delta, m, k), MatrixView::new(&x, 20, k));
            let s = naive(x.transposed(), x);
            let weighted = naive(delta, MatrixView::new(&s, k, k));
            let weighted = MatrixView::new(&weighted, m, k);
            let mut out = vec![f64::NAN; m * m];
            symmetric_product(weighted, delta.transposed(), &mut out, &pool);
            assert_eq!(out, naive(weighted, delta.transposed()));
            let trace: f64 = (0..m).map(|i| out[i * m + i]).sum();
            assert_eq!(quadratic_trace(delta, &s, &pool), trace);
        }
    }

    #[test]
    fn gram_adds_and_survives_values_whose_squares_leave_f32() {
        let pool = ThreadPool::with_threads(2);
        let n = 67;
        let powers: Vec<f32> = (0..n).map(|j| [1.0, 1e30, 1e-30, 1e5][j % 4]).collect();
        let x: Vec<f32> = integers(20 * n, 5).iter().enumerate().map(|(i, &v)| v as f32 * powers[i % n]).collect();
        let mut sum = vec![0.0; n * n];
        accumulate_gram(&x, n, &mut sum, &pool);
        accumulate_gram(&x, n, &mut sum, &pool);
        mirror_upper_triangle(&mut sum, n);
        for i in 0..n {
            for j in 0..n {
                let columns = || x.chunks_exact(n).map(|row| (f64::from(row[i]), f64::from(row[j])));
                let expected: f64 = columns().map(|(a, b)| 2.0 * a * b).sum();
                let size: f64 = columns().map(|(a, b)| 2.0 * (a * b).abs()).sum();
                assert!((sum[i * n + j] - expected).abs() <= 1e-14 * size, "{i} {j}");
            }
        }
    }

    #[test]
    fn gram_keeps_what_stands_beside_a_large_mean() {
        let pool = ThreadPool::with_threads(2);
        let (rows, n) = (512, 66);
        let noise = integers(rows * n, 7);
        let x: Vec<f32> = noise.iter().enumerate().map(|(i, v)| (1000 + i % n) as f32 + *v as f32 / 1024.0).collect();
        let mut sum = vec![0.0; n * n];
        accumulate_gram(&x, n, &mut sum, &pool);
        // The difference of two channels sees the noise alone; f32 sums of squares near 10⁶ would lose it.
        for (i, j) in [(0, 1), (5, 60), (64, 65)] {
            let offset = (j - i) as f64;
            let difference = |row: &[f32]| f64::from(row[j]) - f64::from(row[i]);
            let exact: f64 = x.chunks_exact(n).map(|row| (difference(row) - offset).powi(2)).sum();
            let mean: f64 = x.chunks_exact(n).map(|row| difference(row) - offset).sum();
            let quadratic = sum[i * n + i] + sum[j * n + j] - 2.0 * sum[i * n + j];
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
        let (m, k) = (150, 190);
        let a: Vec<f64> = (0..m * k).map(|i| (i as f64 * 0.7).sin()).collect();
        let x: Vec<f32> = (0..512 * k).map(|i| (i as f32 * 0.3).sin()).collect();
        let run = |threads| {
            let pool = ThreadPool::with_threads(threads);
            let a = MatrixView::new(&a, m, k);
            let mut gram = vec![0.0; k * k];
            accumulate_gram(&x, k, &mut gram, &pool);
            mirror_upper_triangle(&mut gram, k);
            let mut weighted = vec![0.0; m * k];
            product(a, MatrixView::new(&gram, k, k), &mut weighted, &pool);
            let mut outer = vec![0.0; m * m];
            symmetric_product(MatrixView::new(&weighted, m, k), a.transposed(), &mut outer, &pool);
            (quadratic_trace(a, &gram, &pool), gram, weighted, outer)
        };
        let one = run(1);
        assert_eq!(one, run(2));
        assert_eq!(one, run(5));
    }
}
