use kintsugi_linalg::{
    MatrixView, SymmetricOperator, UpperTriangle, product_by_columns, times_symmetric, times_symmetric_by_columns,
};
use kintsugi_runtime::ThreadPool;

use crate::channel_sums::ChannelSums;

/// What a method believes the inputs look like: the M of `‖Δ‖² = tr(Δ M Δᵀ)`.
pub(crate) enum InputMetric<'a> {
    /// All of their second moments.
    SecondMoment(&'a UpperTriangle<f64>),
    /// The energy of each channel: channels are taken for uncorrelated.
    Energies(Vec<f64>),
    /// Nothing: all inputs are alike.
    Identity,
}

impl InputMetric<'_> {
    /// `X M` for a row-major `[rows, columns]` matrix of many rows.
    pub(crate) fn weigh(&self, x: Vec<f64>, rows: usize, columns: usize, pool: &ThreadPool) -> Vec<f64> {
        match self {
            InputMetric::SecondMoment(second_moment) => {
                let mut out = vec![0.0; x.len()];
                times_symmetric(MatrixView::new(&x, rows, columns), second_moment, &mut out, pool);
                out
            }
            _ => self.weigh_channels(x, columns),
        }
    }

    /// `X M` for a matrix of few rows.
    pub(crate) fn weigh_few(&self, x: Vec<f64>, rows: usize, columns: usize, pool: &ThreadPool) -> Vec<f64> {
        match self {
            InputMetric::SecondMoment(second_moment) => {
                times_symmetric_by_columns(MatrixView::new(&x, rows, columns), second_moment, pool)
            }
            _ => self.weigh_channels(x, columns),
        }
    }

    /// `tr(Δ M Δᵀ)` of a row-major matrix, in a metric that knows nothing of correlations.
    pub(crate) fn energy_by_channels(&self, delta: &[f64], columns: usize, pool: &ThreadPool) -> f64 {
        let energies = match self {
            InputMetric::Energies(energies) => energies,
            _ => &vec![1.0; columns],
        };
        let fill = |i: usize, row: &mut [f64]| row.copy_from_slice(&delta[i * columns..(i + 1) * columns]);
        ChannelSums::new(delta.len() / columns.max(1), energies, fill, pool).apart
    }

    fn weigh_channels(&self, mut x: Vec<f64>, columns: usize) -> Vec<f64> {
        if let InputMetric::Energies(energies) = self {
            for row in x.chunks_exact_mut(columns) {
                row.iter_mut().zip(energies).for_each(|(value, energy)| *value *= energy);
            }
        }
        x
    }
}

/// `G = Δ M Δᵀ`, which is never formed.
pub(crate) struct OutputOperator<'a> {
    /// `[rows, columns]`
    pub(crate) delta: MatrixView<'a, f64>,
    pub(crate) metric: &'a InputMetric<'a>,
}

/// `Δ S Δᵀ` with all products in f32, blocks in f64.
pub(crate) struct NarrowOperator<'a> {
    /// `[rows, columns]`
    pub(crate) delta: MatrixView<'a, f32>,
    pub(crate) second_moment: &'a UpperTriangle<f32>,
}

impl SymmetricOperator for NarrowOperator<'_> {
    fn side(&self) -> usize {
        self.delta.rows()
    }

    fn apply(&self, block: &[f64], count: usize, pool: &ThreadPool) -> Vec<f64> {
        let (rows, columns) = (self.delta.rows(), self.delta.columns());
        let block: Vec<f32> = block.iter().map(|&value| value as f32).collect();
        let inputs = product_by_columns(MatrixView::new(&block, count, rows), self.delta, pool);
        let weighted = times_symmetric_by_columns(MatrixView::new(&inputs, count, columns), self.second_moment, pool);
        let image = product_by_columns(MatrixView::new(&weighted, count, columns), self.delta.transposed(), pool);
        image.into_iter().map(f64::from).collect()
    }
}

impl SymmetricOperator for OutputOperator<'_> {
    fn side(&self) -> usize {
        self.delta.rows()
    }

    fn apply(&self, block: &[f64], count: usize, pool: &ThreadPool) -> Vec<f64> {
        let (rows, columns) = (self.delta.rows(), self.delta.columns());
        let inputs = product_by_columns(MatrixView::new(block, count, rows), self.delta, pool);
        let weighted = self.metric.weigh_few(inputs, count, columns, pool);
        product_by_columns(MatrixView::new(&weighted, count, columns), self.delta.transposed(), pool)
    }
}
