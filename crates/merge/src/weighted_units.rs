use kintsugi_linalg::{MatrixView, UpperTriangle, product, symmetric_product, times_symmetric};
use kintsugi_runtime::ThreadPool;

use crate::UnitStack;

/// The a of a stack of units in the metric of inputs, `⟨x, y⟩ = xᵀ S y` with the second moment S of what the Linear
/// reads: the distance of two updates is then that of their outputs, `‖(M − T) S^½‖`.
#[derive(Debug)]
pub(crate) struct WeightedUnits {
    /// `A S`, `[units, in]`.
    images: Vec<f64>,
    /// `A S Aᵀ`, `[units, units]`.
    pub(crate) gram: Vec<f64>,
}

impl WeightedUnits {
    pub(crate) fn new(stack: &UnitStack, second_moment: &UpperTriangle<f64>, pool: &ThreadPool) -> Self {
        let (images, gram) = measured(&stack.a, stack.units(), second_moment, pool);
        WeightedUnits { images, gram }
    }

    /// `X S Aᵀ`, `[count, units]`, for the rows X `[count, in]`.
    pub(crate) fn products(&self, rows: &[f32], count: usize, units: usize, pool: &ThreadPool) -> Vec<f64> {
        let width = rows.len().checked_div(count).unwrap_or(0);
        let rows: Vec<f64> = rows.iter().map(|&value| f64::from(value)).collect();
        let mut out = vec![0.0; count * units];
        let images = MatrixView::new(&self.images, units, width);
        if count > 0 {
            product(MatrixView::new(&rows, count, width), images.transposed(), &mut out, pool);
        }
        out
    }
}

/// `X S` and `X S Xᵀ` for the rows X `[count, side of S]`.
pub(crate) fn measured(
    rows: &[f32],
    count: usize,
    second_moment: &UpperTriangle<f64>,
    pool: &ThreadPool,
) -> (Vec<f64>, Vec<f64>) {
    let width = second_moment.side();
    let rows: Vec<f64> = rows.iter().map(|&value| f64::from(value)).collect();
    let rows = MatrixView::new(&rows, count, width);
    let (mut images, mut gram) = (vec![0.0; count * width], vec![0.0; count * count]);
    if count > 0 {
        times_symmetric(rows, second_moment, &mut images, pool);
        symmetric_product(MatrixView::new(&images, count, width), rows.transposed(), &mut gram, pool);
    }
    (images, gram)
}
