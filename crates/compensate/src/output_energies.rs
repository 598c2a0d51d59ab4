use kintsugi_calibration::Calibration;
use kintsugi_linalg::{MatrixView, gram_inner, quadratic_trace_of};
use kintsugi_runtime::ThreadPool;

/// Computes `‖M X‖² = tr(M S Mᵀ)` of matrices that share inputs: in f32 where that is accurate enough, in half the time.
pub(crate) struct OutputEnergies<'a> {
    calibration: &'a Calibration,
    /// `S_jj`
    channels: Vec<f64>,
    /// The matrix in f32.
    narrow: Vec<f32>,
}

/// An energy, and whether it was computed in f32.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Energy {
    pub(crate) value: f64,
    pub(crate) narrow: bool,
}

impl<'a> OutputEnergies<'a> {
    /// Rows of a task.
    const BAND: usize = 64;
    /// Channels below which f64 costs nothing that shows.
    pub(crate) const LEAST_CHANNELS: usize = 512;
    /// How many roundings of f32 the sum of an energy can amount to, relative to the energies of the channels.
    const ROUNDINGS: f64 = 32.0;
    /// Relative error of an energy in f32 where so many roundings add up: more than is seen, which is about 1e-7.
    const TOLERANCE: f64 = 1e-5;

    pub(crate) fn new(calibration: &'a Calibration) -> Self {
        OutputEnergies { calibration, channels: calibration.energies(), narrow: Vec::new() }
    }

    /// The last matrix in f32; nothing where that was not accurate.
    pub(crate) fn into_narrow(self) -> Vec<f32> {
        self.narrow
    }

    /// The energy of a matrix whose row `i` is written by `fill(i, row)`.
    ///
    /// An energy in f32 is taken where it is not small beside what its channels would have if they were uncorrelated:
    /// an element of `MᵀM` is rounded relative to the norms of two columns, and the sum of all roundings, weighed with S,
    /// relative to `Σ S_jj ‖m_j‖²`.
    pub(crate) fn of(
        &mut self,
        rows: usize,
        fill: impl Fn(usize, &mut [f64]) + Sync + Send,
        pool: &ThreadPool,
    ) -> Energy {
        let columns = self.channels.len();
        if columns >= Self::LEAST_CHANNELS {
            let (channels, largest) = self.narrow(rows, &fill, pool);
            if in_range(largest, &self.channels, rows) {
                let matrix = MatrixView::new(&self.narrow, rows, columns);
                let value = gram_inner(matrix, self.calibration.second_moment(), pool);
                if Self::ROUNDINGS * f64::from(f32::EPSILON) * channels <= Self::TOLERANCE * value {
                    return Energy { value, narrow: true };
                }
            }
        }
        self.narrow = Vec::new();
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

    /// Takes the matrix in f32. Gives the energy of its channels, `Σ S_jj ‖m_j‖²`, and its largest magnitude.
    fn narrow(&mut self, rows: usize, fill: impl Fn(usize, &mut [f64]) + Sync + Send, pool: &ThreadPool) -> (f64, f64) {
        let columns = self.channels.len();
        self.narrow.resize(rows * columns, 0.0);
        let mut bands: Vec<(&mut [f32], (f64, f64))> =
            self.narrow.chunks_mut(Self::BAND * columns).map(|band| (band, (0.0, 0.0))).collect();
        pool.for_each_chunk(&mut bands, 1, |index, band| {
            let (band, (energy, largest)) = &mut band[0];
            let mut row = vec![0.0; columns];
            for (i, narrow) in band.chunks_exact_mut(columns).enumerate() {
                fill(index * Self::BAND + i, &mut row);
                *energy += row.iter().zip(&self.channels).map(|(value, energy)| value * value * energy).sum::<f64>();
                *largest = row.iter().fold(*largest, |largest, value| largest.max(value.abs()));
                narrow.iter_mut().zip(&row).for_each(|(narrow, &value)| *narrow = value as f32);
            }
        });
        let found = bands.iter().map(|(_, found)| *found);
        found.fold((0.0, 0.0), |(sum, most), (energy, largest)| (sum + energy, most.max(largest)))
    }
}

/// Whether products and sums of a matrix with that largest magnitude and of second moments with that diagonal stay far
/// from both ends of f32.
fn in_range(largest: f64, channels: &[f64], rows: usize) -> bool {
    let moment = channels.iter().fold(0.0f64, |most, &energy| most.max(energy));
    let terms = (rows.max(channels.len()) as f64).powi(2);
    [moment, largest * largest, largest * moment, largest * largest * moment]
        .iter()
        .all(|&size| (1e-25..=1e36 / terms).contains(&size))
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
            let mut energies = OutputEnergies::new(&calibration);
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

    #[test]
    fn what_leaves_the_range_of_f32_is_computed_in_f64() {
        let pool = ThreadPool::with_threads(2);
        let (width, rows) = (512, 3);
        for (weight, input, narrow) in
            [(1.0, 1.0f32, true), (1e-15, 1.0, false), (1e20, 1.0, false), (1.0, 1e-18, false), (1.0, 1e16, false)]
        {
            let mut random = SplitMix64::new(9);
            let mut uniform = || random.uniform() - 0.5;
            let mut builder = CalibrationBuilder::new(width);
            let inputs: Vec<f32> = (0..100 * width).map(|_| input * uniform() as f32).collect();
            let matrix: Vec<f64> = (0..rows * width).map(|_| weight * uniform()).collect();
            builder.push(&inputs, &pool).unwrap();
            let calibration = builder.finish(&pool);
            let mut energies = OutputEnergies::new(&calibration);
            let fill = |i: usize, row: &mut [f64]| row.copy_from_slice(&matrix[i * width..(i + 1) * width]);
            let (found, exact) = (energies.of(rows, fill, &pool), energies.exactly(rows, fill, &pool));
            assert_eq!(found.narrow, narrow, "{weight} {input}");
            assert!((found.value / exact - 1.0).abs() <= 1e-5, "{weight} {input}: {found:?} {exact:e}");
        }
    }
}
