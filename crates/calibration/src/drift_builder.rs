use kintsugi_linalg::{accumulate_cross, accumulate_gram};
use kintsugi_runtime::{Error, ErrorCode, Result, ThreadPool};

use crate::{CHUNK_TOKENS, Drift};

/// Sums the [`Drift`] of input vectors as they come, in pairs.
///
/// Pairs are gathered into chunks of [`CHUNK_TOKENS`] in token order, so the result is the same, bit for bit, however the
/// tokens were split into calls and whatever the number of threads.
#[derive(Debug)]
pub struct DriftBuilder {
    sums: Drift,
    /// `x − x̂` of the chunk that is not full yet: the differences of two f32, rounded to one.
    drifts: Vec<f32>,
    /// `x̂` of it.
    deployed: Vec<f32>,
    /// What each pair counts.
    weight: f64,
}

impl DriftBuilder {
    /// Sums over pairs of vectors of length `width`.
    pub fn new(width: usize) -> Self {
        DriftBuilder { sums: Drift::zeros(width), drifts: Vec::new(), deployed: Vec::new(), weight: 1.0 }
    }

    /// What each of the pairs counts that come from here on; one at first. Chunks begin anew.
    pub fn weigh(&mut self, weight: f64, pool: &ThreadPool) {
        self.add_chunk(pool);
        self.weight = weight;
    }

    /// Adds pairs: `drifts` holds `x − x̂` and `deployed` holds `x̂`, both `[count, width]`, row-major, in token order.
    ///
    /// # Errors
    /// `ERR_VALUE_NOT_FINITE` when a value is NaN or infinite and `ERR_SHAPE_MISMATCH` when there are no whole pairs of
    /// vectors; nothing is added then.
    pub fn push(&mut self, drifts: &[f32], deployed: &[f32], pool: &ThreadPool) -> Result<()> {
        let width = self.sums.width;
        if width == 0 || !drifts.len().is_multiple_of(width) || drifts.len() != deployed.len() {
            let message =
                format!("{} and {} values are not whole pairs of vectors of {width}", drifts.len(), deployed.len());
            return Err(Error::new(ErrorCode::ShapeMismatch, message).subject("calibration input"));
        }
        if let Some(position) = drifts.iter().zip(deployed).position(|(d, x)| !d.is_finite() || !x.is_finite()) {
            let token = self.sums.tokens as usize + (self.drifts.len() + position) / width;
            let message = format!(
                "token {token} differs by {} from {} at input {} in the dense model",
                drifts[position],
                deployed[position],
                position % width
            );
            return Err(Error::new(ErrorCode::ValueNotFinite, message)
                .subject("calibration input")
                .hint("A model overflows on this text; check its weights, or run it in f32 precision"));
        }
        let (mut drifts, mut deployed) = (drifts, deployed);
        while !drifts.is_empty() {
            let count = (CHUNK_TOKENS * width - self.drifts.len()).min(drifts.len());
            self.drifts.extend_from_slice(&drifts[..count]);
            self.deployed.extend_from_slice(&deployed[..count]);
            (drifts, deployed) = (&drifts[count..], &deployed[count..]);
            if self.drifts.len() == CHUNK_TOKENS * width {
                self.add_chunk(pool);
            }
        }
        Ok(())
    }

    /// Adds what is left in the last chunk.
    pub fn finish(mut self, pool: &ThreadPool) -> Drift {
        self.add_chunk(pool);
        self.sums
    }

    fn add_chunk(&mut self, pool: &ThreadPool) {
        let Drift { width, tokens, cross, square } = &mut self.sums;
        *tokens += (self.drifts.len() / (*width).max(1)) as u64;
        // Before the first block that is compressed both models are one.
        if self.drifts.iter().any(|&value| value != 0.0) {
            accumulate_cross(&self.drifts, &self.deployed, self.weight, cross, *width, pool);
            accumulate_gram(&self.drifts, self.weight, square, pool);
        }
        self.drifts.clear();
        self.deployed.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(tokens: usize, width: usize, seed: usize) -> Vec<f32> {
        (0..tokens * width).map(|i| (((i + seed) * i % 1009) as f32 * 0.013).sin() * (1 + i % 7) as f32).collect()
    }

    fn sum(drifts: &[f32], deployed: &[f32], width: usize, cuts: &[usize], threads: usize) -> Drift {
        let pool = ThreadPool::with_threads(threads);
        let mut builder = DriftBuilder::new(width);
        let mut first = 0usize;
        for &cut in cuts.iter().chain([&usize::MAX]) {
            let last = first.max(drifts.len().min(first.saturating_add(cut.saturating_mul(width))));
            builder.push(&drifts[first..last], &deployed[first..last], &pool).unwrap();
            first = last;
        }
        builder.finish(&pool)
    }

    #[test]
    fn sums_equal_the_f64_oracle() {
        let (tokens, width) = (1300, 70);
        let (drifts, deployed) = (rows(tokens, width, 3), rows(tokens, width, 8));
        let found = sum(&drifts, &deployed, width, &[], 2);
        assert_eq!((found.tokens(), found.width()), (tokens as u64, width));
        let column = |of: &[f32], i: usize| of.chunks_exact(width).map(|row| f64::from(row[i])).collect::<Vec<f64>>();
        let near = |value: f64, left: &[f64], right: &[f64]| {
            let exact: f64 = left.iter().zip(right).map(|(a, b)| a * b).sum();
            let size: f64 = left.iter().zip(right).map(|(a, b)| (a * b).abs()).sum();
            assert!((value - exact).abs() <= 1e-13 * size, "{value} {exact}");
        };
        for i in 0..width {
            let d = column(&drifts, i);
            for j in 0..width {
                near(found.cross()[i * width + j], &d, &column(&deployed, j));
                near(found.square().at(i, j), &d, &column(&drifts, j));
            }
        }
    }

    #[test]
    fn neither_the_cut_into_calls_nor_the_threads_change_a_bit() {
        let (tokens, width) = (1111, 130);
        let (drifts, deployed) = (rows(tokens, width, 1), rows(tokens, width, 2));
        let whole = sum(&drifts, &deployed, width, &[], 1);
        for (cuts, threads) in [(vec![1; 700], 1), (vec![511, 1, 2], 3), (vec![0, 513, 512], 2), (vec![], 4)] {
            assert!(sum(&drifts, &deployed, width, &cuts, threads) == whole);
        }
    }

    #[test]
    fn weights_count_pairs_more_than_once() {
        let pool = ThreadPool::with_threads(2);
        let (width, weights) = (41, [3.0, 0.5, 2.0]);
        let (drifts, deployed) = (rows(700, width, 4), rows(700, width, 5));
        let (mut builder, mut expected) = (DriftBuilder::new(width), DriftBuilder::new(width));
        let parts = drifts.chunks(250 * width).zip(deployed.chunks(250 * width));
        for ((drifts, deployed), weight) in parts.zip(weights) {
            builder.weigh(weight, &pool);
            builder.push(drifts, deployed, &pool).unwrap();
            // Twice the weights are whole numbers: each pair as often as that.
            (0..(2.0 * weight) as usize).for_each(|_| expected.push(drifts, deployed, &pool).unwrap());
        }
        let (found, expected) = (builder.finish(&pool), expected.finish(&pool));
        assert_eq!(found.tokens(), 700, "tokens are counted once");
        let largest = expected.cross().iter().fold(0.0f64, |most, value| most.max(value.abs()));
        assert!(found.cross().iter().zip(expected.cross()).all(|(a, b)| (2.0 * a - b).abs() <= 1e-12 * largest));
        for i in 0..width {
            for (a, b) in found.square().row(i).iter().zip(expected.square().row(i)) {
                assert!((2.0 * a - b).abs() <= 1e-12 * expected.square().at(i, i).max(largest));
            }
        }
    }

    #[test]
    fn tokens_that_are_alike_leave_no_drift() {
        let deployed = rows(600, 9, 1);
        let found = sum(&vec![0.0; deployed.len()], &deployed, 9, &[], 2);
        assert!(found.is_zero() && found.cross().iter().all(|&value| value == 0.0));
        assert_eq!(found.tokens(), 600);
        assert!(!sum(&deployed, &deployed, 9, &[], 2).is_zero());
    }

    #[test]
    fn broken_pairs_are_refused_and_add_nothing() {
        let pool = ThreadPool::with_threads(1);
        let mut builder = DriftBuilder::new(3);
        builder.push(&[1.0; 9], &[2.0; 9], &pool).unwrap();
        for bad in [f32::NAN, f32::INFINITY] {
            for (drifts, deployed) in [([0.0, bad, 0.0], [1.0; 3]), ([1.0; 3], [0.0, bad, 0.0])] {
                let error = builder.push(&drifts, &deployed, &pool).unwrap_err();
                assert_eq!(error.code, ErrorCode::ValueNotFinite);
                assert!(error.message.contains("token 3") && error.message.contains("input 1"), "{}", error.message);
            }
        }
        for (drifts, deployed) in [(4, 4), (3, 6)] {
            let error = builder.push(&vec![1.0; drifts], &vec![1.0; deployed], &pool).unwrap_err();
            assert_eq!(error.code, ErrorCode::ShapeMismatch);
        }
        let drift = builder.finish(&pool);
        assert_eq!((drift.tokens(), drift.cross().to_vec()), (3, vec![6.0; 9]));
    }
}
