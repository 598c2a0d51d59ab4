use crate::Calibration;

impl Calibration {
    /// Share of its energy below which the variance of a channel is rounding: that of the sums in f64, and of values in
    /// f32 whose deviations are no more than a millionth of them.
    const NO_VARIANCE: f64 = 1e-12;

    /// What all vectors count together: their number, or the sum of their weights in a mixture.
    pub fn weight(&self) -> f64 {
        self.weight
    }

    /// `μ = Σ x / Σ 1`, `[width]`, both sums weighted; zeros where no vector was summed.
    pub fn mean(&self) -> Vec<f64> {
        let weight = if self.weight > 0.0 { self.weight } else { 1.0 };
        self.sums.iter().map(|sum| sum / weight).collect()
    }

    /// The sums of `x − μ`: second moments `S − T μ μᵀ` with T the [weight](Calibration::weight), and sums that are
    /// zero. Absolute sums cannot be centred and are those of the vectors as they are.
    ///
    /// Where the mean dominates, both terms cancel: an element is off by the rounding of the sums in `S`, about 1e-14
    /// of it, which is `1e-14 (1 + μ²/σ²)` of the variances. A mean of 1e4 deviations leaves six digits. A channel whose
    /// variance is not well above that noise is constant: its row and column are zeros.
    #[must_use]
    pub fn centred(&self) -> Calibration {
        let mut centred = Calibration { sums: vec![0.0; self.width], ..self.clone() };
        let mean = self.mean();
        let constant: Vec<bool> = (0..self.width)
            .map(|i| {
                let energy = self.second_moment.at(i, i);
                energy - self.sums[i] * mean[i] <= Self::NO_VARIANCE * energy
            })
            .collect();
        for i in 0..self.width {
            for (j, value) in (i..).zip(centred.second_moment.row_mut(i)) {
                *value = if constant[i] || constant[j] { 0.0 } else { *value - self.sums[i] * mean[j] };
            }
        }
        centred
    }
}

#[cfg(test)]
mod tests {
    use kintsugi_linalg::SplitMix64;
    use kintsugi_runtime::ThreadPool;

    use crate::{Calibration, CalibrationBuilder};

    /// Vectors with deviations of about one around `mean · (1 + j)`; the last channel is constant, the one before zero.
    fn vectors(tokens: usize, width: usize, mean: f32) -> Vec<f32> {
        let mut random = SplitMix64::new(3);
        let mut vectors = Vec::with_capacity(tokens * width);
        for _ in 0..tokens {
            // Channels that are correlated: differences of one walk.
            let mut walk = 0.0;
            for j in 0..width {
                walk = 0.5 * walk + (random.uniform() - 0.5) as f32 * 3.0;
                vectors.push(match width - j {
                    1 => mean + 0.7,
                    2 => 0.0,
                    _ => walk + mean * (1 + j) as f32 / width as f32,
                });
            }
        }
        vectors
    }

    /// Weighted sums of parts of the vectors, each of which counts as often as its weight says.
    fn sums(vectors: &[f32], width: usize, weights: &[f64]) -> Calibration {
        let pool = ThreadPool::with_threads(2);
        let mut builder = CalibrationBuilder::new(width);
        let part = vectors.len() / width / weights.len() * width;
        for (part, &weight) in vectors.chunks(part).zip(weights) {
            builder.weigh(weight, &pool);
            builder.push(part, &pool).unwrap();
        }
        builder.finish(&pool)
    }

    #[test]
    fn centring_equals_centring_every_vector_in_f64() {
        let (tokens, width) = (1800, 24);
        for mean in [0.0, 1.0, 100.0, 1e4] {
            for weights in [&[1.0][..], &[3.0, 0.5, 2.0]] {
                let vectors = vectors(tokens, width, mean);
                let calibration = sums(&vectors, width, weights);
                let of = |token: usize| weights[token / (tokens / weights.len())];
                let total: f64 = (0..tokens).map(of).sum();
                let column = |j: usize| vectors.chunks(width).map(move |row| f64::from(row[j])).enumerate();
                let means: Vec<f64> =
                    (0..width).map(|j| column(j).map(|(t, x)| of(t) * x).sum::<f64>() / total).collect();
                assert_eq!((calibration.weight(), calibration.tokens()), (total, tokens as u64));
                let close = |(a, b): (&f64, &f64)| (a - b).abs() <= 1e-12 * b.abs();
                assert!(calibration.mean().iter().zip(&means).all(close));
                let centred = calibration.centred();
                assert!(centred.sums().iter().all(|&sum| sum == 0.0) && centred.tokens() == tokens as u64);
                let exact = |i: usize, j: usize| -> f64 {
                    column(i).zip(column(j)).map(|((t, a), (_, b))| of(t) * (a - means[i]) * (b - means[j])).sum()
                };
                for i in 0..width {
                    for j in i..width {
                        let (found, exact) = (centred.second_moment().at(i, j), exact(i, j));
                        if j >= width - 2 {
                            assert_eq!(found, 0.0, "{mean}: channels {i} and {j}, one of which is constant");
                            continue;
                        }
                        let energy = |i| calibration.second_moment().at(i, i);
                        let noise = 1e-14 * (energy(i) * energy(j)).sqrt();
                        assert!((found - exact).abs() <= noise, "{mean} {i} {j}: {found} {exact}, noise {noise:e}");
                        assert!(i != j || (found / exact - 1.0).abs() <= 1e-6, "{mean} {i}: {found} {exact}");
                    }
                }
            }
        }
    }

    #[test]
    fn weights_add_up_where_sums_are_merged() {
        let (width, weights) = (7, [3.0, 0.5]);
        let vectors = vectors(600, width, 2.0);
        let streamed = sums(&vectors, width, &weights);
        let mut merged = Calibration::zeros(width);
        assert_eq!((merged.weight(), merged.mean()), (0.0, vec![0.0; width]), "no vectors");
        for (part, weight) in vectors.chunks(300 * width).zip(weights) {
            merged.merge(&sums(part, width, &[1.0]), weight).unwrap();
        }
        assert_eq!((streamed.weight(), merged.weight()), (1050.0, 1050.0));
        assert!(streamed.mean().iter().zip(merged.mean()).all(|(a, b)| (a - b).abs() <= 1e-12 * b.abs()));
    }
}
