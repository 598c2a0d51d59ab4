use faer::linalg::matmul::matmul;
use faer::{Accum, Par};
use kintsugi_runtime::ThreadPool;

use crate::upper_triangle::BAND_ROWS;
use crate::{MatrixView, MatrixViewMut, Scalar, UpperTriangle};

/// Rows whose products are summed in the type of the matrix.
const STRETCH: usize = 1024;

/// `⟨Mᵀ M, S⟩ = tr(M S Mᵀ)` for a symmetric S: the energy `‖M X‖²` of the outputs of M on inputs with second moment
/// `S = X Xᵀ`.
///
/// Blocks of `Mᵀ M` are computed in the type of M over stretches of 1024 rows and weighed with S in f64. Beside
/// [`quadratic_forms`](crate::quadratic_forms) with a matrix that is whole in memory this keeps S as it is, and the
/// inner size of every product is large.
///
/// # Panics
/// When M has not a column per row of S.
pub fn gram_inner<T: Scalar>(m: MatrixView<'_, T>, s: &UpperTriangle<f64>, pool: &ThreadPool) -> f64 {
    let (rows, n) = (m.rows(), m.columns());
    assert_eq!(n, s.side(), "M has a column per row of S");
    let blocks: Vec<(usize, usize)> = (0..s.bands()).flat_map(|i| (i..s.bands()).map(move |j| (i, j))).collect();
    let parts = pool.map(blocks.len(), |index| {
        let (left, right) = (blocks[index].0 * BAND_ROWS, blocks[index].1 * BAND_ROWS);
        let (height, width) = (BAND_ROWS.min(n - left), BAND_ROWS.min(n - right));
        let (left_columns, right_columns) = (m.column_range(left..left + height), m.column_range(right..right + width));
        let mut products = vec![T::ZERO; height * width];
        let mut sum = 0.0;
        for first in (0..rows).step_by(STRETCH) {
            let stretch = first..rows.min(first + STRETCH);
            let (a, b) = (left_columns.row_range(stretch.clone()).transposed(), right_columns.row_range(stretch));
            let out = MatrixViewMut::new(&mut products, height, width);
            matmul(out.0, Accum::Replace, a.0, b.0, T::ONE, Par::Seq);
            for (i, products) in products.chunks_exact(width).enumerate() {
                // A row of S begins at its diagonal element.
                let moments = s.row(left + i);
                if left == right {
                    sum += products[i].wide() * moments[0] + 2.0 * inner(&products[i + 1..], &moments[1..]);
                } else {
                    sum += 2.0 * inner(products, &moments[right - left - i..]);
                }
            }
        }
        sum
    });
    parts.iter().sum()
}

/// Of as many elements as the shorter one has; in four sums, which the compiler keeps in a vector.
fn inner<T: Scalar>(products: &[T], moments: &[f64]) -> f64 {
    let mut sums = [0.0; 4];
    let (products, moments) = (products.chunks_exact(4), moments[..products.len()].chunks_exact(4));
    let rest: f64 = products.remainder().iter().zip(moments.remainder()).map(|(p, m)| p.wide() * m).sum();
    for (products, moments) in products.zip(moments) {
        for (sum, (product, moment)) in sums.iter_mut().zip(products.iter().zip(moments)) {
            *sum += product.wide() * moment;
        }
    }
    sums.iter().sum::<f64>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{SplitMix64, quadratic_trace};

    #[test]
    fn it_is_the_trace_on_ragged_shapes_whatever_the_threads() {
        let mut random = SplitMix64::new(3);
        for (rows, n) in [(1, 1), (3, 5), (70, 256), (1500, 300), (2049, 515), (0, 4), (4, 0)] {
            // Whole numbers: every product is exact in f32.
            let mut whole =
                |count: usize| -> Vec<f64> { (0..count).map(|_| (random.uniform() * 9.0).floor() - 4.0).collect() };
            let (m, s) = (whole(rows * n), UpperTriangle::of(&whole(n * n), n));
            let narrow: Vec<f32> = m.iter().map(|&value| value as f32).collect();
            let mut expected = 0.0;
            for i in 0..rows {
                for j in 0..n {
                    let weighted: f64 = (0..n).map(|l| m[i * n + l] * s.at(l, j)).sum();
                    expected += weighted * m[i * n + j];
                }
            }
            for threads in [1, 2, 5] {
                let pool = ThreadPool::with_threads(threads);
                assert_eq!(gram_inner(MatrixView::new(&m, rows, n), &s, &pool), expected, "{rows}×{n}");
                assert_eq!(gram_inner(MatrixView::new(&narrow, rows, n), &s, &pool), expected, "{rows}×{n}");
            }
        }
    }

    #[test]
    fn roundings_of_f32_are_small_beside_the_energies_of_the_channels() {
        let pool = ThreadPool::with_threads(2);
        let (rows, n, tokens) = (300, 530, 200);
        let mut random = SplitMix64::new(8);
        let mut value = || random.uniform() - 0.5;
        let x: Vec<f64> = (0..n * tokens).map(|at| value() * if at / tokens % 50 == 3 { 100.0 } else { 1.0 }).collect();
        let x = MatrixView::new(&x, n, tokens);
        let mut moments = vec![0.0; n * n];
        crate::symmetric_product(x, x.transposed(), &mut moments, &pool);
        let s = UpperTriangle::of(&moments, n);
        let narrow: Vec<f32> = (0..rows * n).map(|_| value() as f32).collect();
        let wide: Vec<f64> = narrow.iter().map(|&value| f64::from(value)).collect();
        let expected = quadratic_trace(MatrixView::new(&wide, rows, n), &s, &pool);
        let found = gram_inner(MatrixView::new(&narrow, rows, n), &s, &pool);
        let exact = gram_inner(MatrixView::new(&wide, rows, n), &s, &pool);
        assert!((exact / expected - 1.0).abs() < 1e-12, "{exact} {expected}");
        assert!((found / expected - 1.0).abs() < 1e-6, "{found} {expected}");
        assert!(found != exact);
    }
}
