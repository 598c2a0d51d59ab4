use faer::Accum;
use kintsugi_runtime::ThreadPool;

use crate::block_product::multiply;
use crate::product::mirror_upper_triangle;
use crate::{MatrixView, MatrixViewMut};

/// Rows of a result that one task computes.
const BAND: usize = 64;
/// Columns that are widened to f64 at a time: 1024 rows of them are 4 MiB.
const STRIP: usize = 512;

/// `X Xᵀ` of few long rows of f32, products and sums in f64: `x` is `[rows, columns]`, the result `[rows, rows]`.
///
/// # Panics
/// When the number of values does not fit.
pub fn row_gram(x: &[f32], rows: usize, columns: usize, pool: &ThreadPool) -> Vec<f64> {
    assert_eq!(x.len(), rows * columns, "x is [rows, columns]");
    let mut gram = vec![0.0; rows * rows];
    let mut strip = Vec::new();
    for start in (0..columns).step_by(STRIP) {
        let width = STRIP.min(columns - start);
        widen_strip(x, columns, start, width, &mut strip, pool);
        let strip = MatrixView::new(&strip, rows, width);
        pool.for_each_chunk(&mut gram, BAND * rows, |index, band| {
            let (first, height) = (index * BAND, band.len() / rows);
            let out = MatrixViewMut::new(band, height, rows).column_range(first..rows);
            let (left, right) = (strip.row_range(first..first + height), strip.row_range(first..rows));
            multiply(out.0, Accum::Add, left.0, right.0.transpose(), 1.0);
        });
    }
    mirror_upper_triangle(&mut gram, rows);
    gram
}

/// `X Yᵀ` of rows of f32, products and sums in f64: `x` is `[m, columns]`, `y` is `[n, columns]`, the result `[m, n]`.
///
/// # Panics
/// When the numbers of values do not fit.
pub fn row_products(x: &[f32], m: usize, y: &[f32], n: usize, columns: usize, pool: &ThreadPool) -> Vec<f64> {
    assert_eq!(x.len(), m * columns, "x is [m, columns]");
    assert_eq!(y.len(), n * columns, "y is [n, columns]");
    let mut out = vec![0.0; m * n];
    if m == 0 || n == 0 {
        return out;
    }
    let (mut left, mut right) = (Vec::new(), Vec::new());
    for start in (0..columns).step_by(STRIP) {
        let width = STRIP.min(columns - start);
        widen_strip(x, columns, start, width, &mut left, pool);
        widen_strip(y, columns, start, width, &mut right, pool);
        let (left, right) = (MatrixView::new(&left, m, width), MatrixView::new(&right, n, width));
        pool.for_each_chunk(&mut out, BAND * n, |index, band| {
            let (first, height) = (index * BAND, band.len() / n);
            let left = left.row_range(first..first + height);
            let out = MatrixViewMut::new(band, height, n);
            multiply(out.0, Accum::Add, left.0, right.0.transpose(), 1.0);
        });
    }
    out
}

/// `W X`: sums of long rows of f32 with f64 coefficients, in f64. `w` is `[m, rows]`, `x` is `[rows, columns]`, the
/// result `[m, columns]`.
///
/// # Panics
/// When the numbers of values do not fit.
pub fn combine_rows(w: &[f64], m: usize, x: &[f32], rows: usize, columns: usize, pool: &ThreadPool) -> Vec<f64> {
    assert_eq!(w.len(), m * rows, "w is [m, rows]");
    assert_eq!(x.len(), rows * columns, "x is [rows, columns]");
    let w = MatrixView::new(w, m, rows);
    let strips = pool.map(columns.div_ceil(STRIP), |index| {
        let start = index * STRIP;
        let width = STRIP.min(columns - start);
        let strip: Vec<f64> = x
            .chunks_exact(columns)
            .flat_map(|row| row[start..start + width].iter().map(|&value| f64::from(value)))
            .collect();
        let mut out = vec![0.0; m * width];
        let view = MatrixViewMut::new(&mut out, m, width);
        multiply(view.0, Accum::Replace, w.0, MatrixView::new(&strip, rows, width).0, 1.0);
        out
    });
    let mut out = vec![0.0; m * columns];
    for (index, strip) in strips.iter().enumerate() {
        let start = index * STRIP;
        let width = STRIP.min(columns - start);
        for (row, part) in out.chunks_exact_mut(columns).zip(strip.chunks_exact(width)) {
            row[start..start + width].copy_from_slice(part);
        }
    }
    out
}

/// `strip` = columns `start .. start + width` of `x` as f64.
fn widen_strip(x: &[f32], columns: usize, start: usize, width: usize, strip: &mut Vec<f64>, pool: &ThreadPool) {
    strip.resize(x.len() / columns * width, 0.0);
    pool.for_each_chunk(strip, BAND * width, |index, band| {
        for (i, out) in band.chunks_exact_mut(width).enumerate() {
            let from = (index * BAND + i) * columns + start;
            for (out, &value) in out.iter_mut().zip(&x[from..from + width]) {
                *out = f64::from(value);
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn integers(count: usize, seed: usize) -> Vec<f32> {
        (0..count).map(|i| (((i + seed) * 7919 + (i * i) % 31) % 17) as f32 - 8.0).collect()
    }

    #[test]
    fn every_product_is_exact_on_integers_over_any_number_of_strips() {
        for threads in [1, 3] {
            let pool = ThreadPool::with_threads(threads);
            for (m, n, columns) in [(1, 1, 1), (3, 70, 5), (65, 2, STRIP), (130, 64, 2 * STRIP + 7)] {
                let (x, y) = (integers(m * columns, 1), integers(n * columns, 2));
                let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum::<f64>();
                let row = |of: &[f32], i: usize| of[i * columns..(i + 1) * columns].to_vec();
                let gram = row_gram(&x, m, columns, &pool);
                let cross = row_products(&x, m, &y, n, columns, &pool);
                for i in 0..m {
                    assert!((0..m).all(|j| gram[i * m + j] == dot(&row(&x, i), &row(&x, j))));
                    assert!((0..n).all(|j| cross[i * n + j] == dot(&row(&x, i), &row(&y, j))));
                }
                let w: Vec<f64> = integers(n * m, 3).iter().map(|&value| f64::from(value)).collect();
                let sums = combine_rows(&w, n, &x, m, columns, &pool);
                for i in 0..n {
                    for j in (0..columns).step_by(97) {
                        let sum: f64 = (0..m).map(|l| w[i * m + l] * f64::from(x[l * columns + j])).sum();
                        assert_eq!(sums[i * columns + j], sum);
                    }
                }
            }
        }
    }
}
