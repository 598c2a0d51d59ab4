use kintsugi_runtime::ThreadPool;

/// What the energies of channels say about `‖M X‖²` when nothing is known of how they are correlated.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ChannelSums {
    /// `Σᵢⱼ mᵢⱼ² Sⱼⱼ`: the energy if they are not.
    pub(crate) apart: f64,
    /// `Σᵢ (Σⱼ |mᵢⱼ| √Sⱼⱼ)²`: the most that it can be, by Cauchy–Schwarz.
    pub(crate) together: f64,
}

impl ChannelSums {
    /// Rows of a task.
    const BAND: usize = 64;
    /// How many roundings of f32 the sum of an energy can amount to, relative to the energies of the channels.
    const ROUNDINGS: f64 = 32.0;
    /// Relative error of an energy in f32 where so many roundings add up: more than is seen, which is about 1e-7.
    const TOLERANCE: f64 = 1e-5;
    /// By how much an energy in f32 may be above the most that it can be: an output that is a sum of k products is off
    /// by `k·2⁻²⁴` of their magnitudes at most, and its square by twice that, for k up to 80 000.
    const SLACK: f64 = 1e-2;

    /// Of a matrix whose row `i` is written by `fill(i, row)`, and the energy `S_jj` of each channel; the same whatever the
    /// number of threads.
    pub(crate) fn new(
        rows: usize,
        energies: &[f64],
        fill: impl Fn(usize, &mut [f64]) + Sync + Send,
        pool: &ThreadPool,
    ) -> Self {
        let roots: Vec<f64> = energies.iter().map(|energy| energy.max(0.0).sqrt()).collect();
        let bands = pool.map(rows.div_ceil(Self::BAND), |band| {
            let mut row = vec![0.0; energies.len()];
            let (mut apart, mut together) = (0.0, 0.0);
            for i in band * Self::BAND..rows.min((band + 1) * Self::BAND) {
                fill(i, &mut row);
                let (mut squares, mut magnitudes) = (0.0, 0.0);
                for ((value, energy), root) in row.iter().zip(energies).zip(&roots) {
                    squares += value * value * energy;
                    magnitudes += value.abs() * root;
                }
                apart += squares;
                together += magnitudes * magnitudes;
            }
            (apart, together)
        });
        let (apart, together) = bands.iter().fold((0.0, 0.0), |sums, band| (sums.0 + band.0, sums.1 + band.1));
        ChannelSums { apart, together }
    }

    /// Whether an energy that was computed in f32 is accurate: not small beside [`ChannelSums::apart`], as the roundings of
    /// its terms are relative to that.
    pub(crate) fn is_accurate(&self, value: f64) -> bool {
        // Moments beyond the range of f32 are infinite in it.
        value.is_finite() && Self::ROUNDINGS * f64::from(f32::EPSILON) * self.apart <= Self::TOLERANCE * value
    }

    /// Whether inputs with these energies can have it at all.
    pub(crate) fn is_possible(&self, value: f64) -> bool {
        value <= (1.0 + Self::SLACK) * self.together
    }
}
