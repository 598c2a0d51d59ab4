use std::collections::BTreeMap;

use kintsugi_compensate::OutputSquares;
use kintsugi_model::{DecoderSpec, TapPoint};
use kintsugi_runtime::ThreadPool;

/// Adds up squares of the outputs of original Linears while the inputs that they read are captured: what errors are
/// relative to, which takes as long to compute from second moments as finding factors.
pub(crate) struct OutputSums {
    /// Length of the outputs of each place in [`DecoderSpec::linears`]; `None` where they are not added up.
    widths: Vec<Option<usize>>,
    found: BTreeMap<usize, OutputSquares>,
}

impl OutputSums {
    /// Rows that one task squares.
    const BAND: usize = 64;
    /// Sums of a row that grow side by side.
    const LANES: usize = 8;

    /// Of the Linears that read at some points, where outputs are products with the weights and nothing else.
    pub(crate) fn new(spec: &DecoderSpec, points: &[TapPoint], is_plain: impl Fn(usize) -> bool) -> Self {
        let width = |(place, linear): (usize, &kintsugi_model::LinearSpec)| {
            (points.contains(&linear.slot.tap()) && is_plain(place)).then_some(linear.rows)
        };
        OutputSums { widths: spec.linears.iter().enumerate().map(width).collect(), found: BTreeMap::new() }
    }

    /// Whether outputs of a place are asked for.
    pub(crate) fn adds(&self, place: usize) -> bool {
        self.widths[place].is_some()
    }

    /// Adds outputs for inputs that statistics are taken of and that count `weight` times each; `[count, rows]`.
    pub(crate) fn add(&mut self, place: usize, outputs: &[f32], weight: f64, pool: &ThreadPool) {
        let Some(width) = self.widths[place] else { return };
        let sum: f64 = Self::squares(outputs, width, pool).iter().sum();
        self.found.entry(place).or_default().calibration += weight * sum;
    }

    /// The same for inputs that are held out.
    pub(crate) fn hold_out(&mut self, place: usize, outputs: &[f32], weight: f64, pool: &ThreadPool) {
        let Some(width) = self.widths[place] else { return };
        let squares = Self::squares(outputs, width, pool).into_iter().map(|square| weight * square);
        self.found.entry(place).or_default().held_out.extend(squares);
    }

    /// What was found, by place.
    pub(crate) fn finish(self) -> BTreeMap<usize, OutputSquares> {
        self.found
    }

    /// The sum of the squares of each row, the same whatever the number of threads.
    fn squares(outputs: &[f32], width: usize, pool: &ThreadPool) -> Vec<f64> {
        let mut sums = vec![0.0; outputs.len() / width.max(1)];
        pool.for_each_chunk(&mut sums, Self::BAND, |band, sums| {
            let rows = outputs[band * Self::BAND * width..].chunks_exact(width);
            for (sum, row) in sums.iter_mut().zip(rows) {
                let mut lanes = [0.0f64; Self::LANES];
                let mut rest = row.chunks_exact(Self::LANES);
                for values in &mut rest {
                    lanes.iter_mut().zip(values).for_each(|(lane, &value)| *lane += f64::from(value).powi(2));
                }
                let last: f64 = rest.remainder().iter().map(|&value| f64::from(value).powi(2)).sum();
                *sum = lanes.iter().sum::<f64>() + last;
            }
        });
        sums
    }
}
