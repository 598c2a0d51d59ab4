use kintsugi_calibration::Calibration;
use kintsugi_linalg::{UpperTriangle, quadratic_forms, quadratic_trace_of};
use kintsugi_runtime::ThreadPool;

use crate::channel_sums::ChannelSums;

/// Computes `‖M X‖² = tr(M S Mᵀ)` of matrices that share inputs: in f32 where that is accurate enough, in half the time.
pub(crate) struct OutputEnergies<'a> {
    calibration: &'a Calibration,
    narrow: Option<UpperTriangle<f32>>,
}

/// An energy, and whether it was computed in f32.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Energy {
    pub(crate) value: f64,
    pub(crate) narrow: bool,
}

impl<'a> OutputEnergies<'a> {
    /// Channels below which f64 costs nothing that shows.
    const LEAST_CHANNELS: usize = 512;

    pub(crate) fn new(calibration: &'a Calibration) -> Self {
        let worthwhile = calibration.width() >= Self::LEAST_CHANNELS;
        let narrow = worthwhile.then(|| calibration.second_moment().map(|value| value as f32));
        OutputEnergies { calibration, narrow }
    }

    /// The second moments in f32, where energies were accurate in it.
    pub(crate) fn into_narrow(self) -> Option<UpperTriangle<f32>> {
        self.narrow
    }

    /// Bytes that this takes beside the statistics of that many channels.
    pub(crate) fn bytes(channels: usize) -> u64 {
        if channels >= Self::LEAST_CHANNELS { UpperTriangle::<f32>::bytes(channels) } else { 0 }
    }

    /// The energy of a matrix whose row `i` is written by `fill(i, row)`.
    pub(crate) fn of(&self, rows: usize, fill: impl Fn(usize, &mut [f64]) + Sync + Send, pool: &ThreadPool) -> Energy {
        if let Some(narrow) = &self.narrow {
            let channels = ChannelSums::new(rows, &self.calibration.energies(), &fill, pool);
            let narrowed = |i: usize, out: &mut [f32]| {
                let mut row = vec![0.0; out.len()];
                fill(i, &mut row);
                out.iter_mut().zip(row).for_each(|(out, value)| *out = value as f32);
            };
            let value: f64 = quadratic_forms(rows, narrowed, narrow, pool).iter().sum();
            if channels.is_accurate(value) {
                return Energy { value, narrow: true };
            }
        }
        Energy { value: self.exactly(rows, fill, pool), narrow: false }
    }

    /// The same in f64.
    pub(crate) fn exactly(
        &self,
        rows: usize,
        fill: impl Fn(usize, &mut [f64]) + Sync + Send,
        pool: &ThreadPool,
    ) -> f64 {
        quadratic_trace_of(rows, fill, self.calibration.second_moment(), pool)
    }
}

#[cfg(test)]
mod tests {
    use kintsugi_calibration::CalibrationBuilder;
    use kintsugi_linalg::SplitMix64;

    use super::*;

    #[test]
    fn energies_in_f32_are_taken_only_where_they_are_accurate() {
        let pool = ThreadPool::with_threads(2);
        let (width, rows) = (600, 70);
        let mut random = SplitMix64::new(5);
        let mut uniform = || (random.uniform() - 0.5) as f32;
        let mut seen = [0; 2];
        for (mean, outlier) in [(0.0, 1.0), (0.0, 1e5), (3.0, 1.0), (1e4, 1.0)] {
            let inputs: Vec<f32> = (0..300 * width)
                .map(|at| (uniform() + mean) * if at % width % 97 == 3 { outlier } else { 1.0 })
                .collect();
            let mut builder = CalibrationBuilder::new(width);
            builder.push(&inputs, &pool).unwrap();
            let calibration = builder.finish(&pool);
            let energies = OutputEnergies::new(&calibration);
            let plain: Vec<f64> = (0..rows * width).map(|_| f64::from(uniform())).collect();
            // Rows that answer nothing to a mean, as feedback of errors leaves them.
            let balanced: Vec<f64> = plain
                .chunks(width)
                .flat_map(|row| {
                    let mean = row.iter().sum::<f64>() / width as f64;
                    row.iter().map(move |value| value - mean)
                })
                .collect();
            for matrix in [plain, balanced] {
                let fill = |i: usize, row: &mut [f64]| row.copy_from_slice(&matrix[i * width..(i + 1) * width]);
                let (found, exact) = (energies.of(rows, fill, &pool), energies.exactly(rows, fill, &pool));
                assert!((found.value / exact - 1.0).abs() <= 1e-5, "{mean} {outlier}: {found:?} {exact:e}");
                assert!(found.narrow || found.value == exact);
                seen[usize::from(found.narrow)] += 1;
            }
        }
        assert!(seen[0] > 0 && seen[1] > 3, "{seen:?}");
    }
}
