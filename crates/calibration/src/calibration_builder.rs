use kintsugi_linalg::accumulate_gram;
use kintsugi_runtime::{Error, ErrorCode, Result, ThreadPool};

use crate::Calibration;

/// Tokens whose products are summed before they are added to the rest.
pub const CHUNK_TOKENS: usize = 512;

/// Sums input vectors as they come.
///
/// Vectors are gathered into chunks of [`CHUNK_TOKENS`] in token order, so the result is the same, bit for bit,
/// however the tokens were split into calls and whatever the number of threads.
#[derive(Debug)]
pub struct CalibrationBuilder {
    /// The sums so far.
    sums: Calibration,
    /// Vectors of the chunk that is not full yet.
    chunk: Vec<f32>,
    /// What each of them counts.
    weight: f64,
}

impl CalibrationBuilder {
    /// Sums over vectors of length `width`.
    pub fn new(width: usize) -> Self {
        CalibrationBuilder { sums: Calibration::zeros(width), chunk: Vec::new(), weight: 1.0 }
    }

    /// What each of the vectors counts that come from here on; one at first. Chunks begin anew.
    pub fn weigh(&mut self, weight: f64, pool: &ThreadPool) {
        self.add_chunk(pool);
        self.weight = weight;
    }

    /// Adds vectors: `rows` is `[count, width]`, row-major, in token order.
    ///
    /// # Errors
    /// `ERR_VALUE_NOT_FINITE` when a value is NaN or infinite and `ERR_SHAPE_MISMATCH` when `rows` does not hold whole
    /// vectors; nothing is added then.
    pub fn push(&mut self, rows: &[f32], pool: &ThreadPool) -> Result<()> {
        let width = self.sums.width;
        if width == 0 || !rows.len().is_multiple_of(width) {
            let message = format!("{} values are not whole vectors of {width}", rows.len());
            return Err(Error::new(ErrorCode::ShapeMismatch, message).subject("calibration input"));
        }
        if let Some(position) = rows.iter().position(|value| !value.is_finite()) {
            let token = self.sums.tokens + (self.chunk.len() + position) as u64 / width as u64;
            let message = format!("token {token} has the value {} at input {}", rows[position], position % width);
            return Err(Error::new(ErrorCode::ValueNotFinite, message)
                .subject("calibration input")
                .hint("The model overflows on this text; check its weights, or run it in f32 precision"));
        }
        let mut rest = rows;
        while !rest.is_empty() {
            let room = CHUNK_TOKENS * width - self.chunk.len();
            let (now, later) = rest.split_at(room.min(rest.len()));
            self.chunk.extend_from_slice(now);
            rest = later;
            if self.chunk.len() == CHUNK_TOKENS * width {
                self.add_chunk(pool);
            }
        }
        Ok(())
    }

    /// Adds what is left in the last chunk.
    pub fn finish(mut self, pool: &ThreadPool) -> Calibration {
        self.add_chunk(pool);
        self.sums
    }

    fn add_chunk(&mut self, pool: &ThreadPool) {
        let Calibration { width, tokens, weight, second_moment, sums, absolute_sums } = &mut self.sums;
        if self.chunk.is_empty() {
            return;
        }
        accumulate_gram(&self.chunk, self.weight, second_moment, pool);
        for row in self.chunk.chunks_exact(*width) {
            for ((sum, absolute), &value) in sums.iter_mut().zip(absolute_sums.iter_mut()).zip(row) {
                *sum += self.weight * f64::from(value);
                *absolute += self.weight * f64::from(value.abs());
            }
        }
        let count = self.chunk.len() / *width;
        *tokens += count as u64;
        *weight += self.weight * count as f64;
        self.chunk.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(tokens: usize, width: usize) -> Vec<f32> {
        (0..tokens * width).map(|i| ((i * i % 1009) as f32 * 0.013).sin() * (1 + i % 7) as f32).collect()
    }

    fn sum(rows: &[f32], width: usize, cuts: &[usize], threads: usize) -> Calibration {
        let pool = ThreadPool::with_threads(threads);
        let mut builder = CalibrationBuilder::new(width);
        let mut rest = rows;
        for &cut in cuts {
            let (now, later) = rest.split_at((cut * width).min(rest.len()));
            builder.push(now, &pool).unwrap();
            rest = later;
        }
        builder.push(rest, &pool).unwrap();
        builder.finish(&pool)
    }

    #[test]
    fn sums_equal_the_f64_oracle() {
        let (tokens, width) = (1300, 70);
        let x = rows(tokens, width);
        let calibration = sum(&x, width, &[], 2);
        assert_eq!((calibration.tokens(), calibration.width()), (tokens as u64, width));
        for i in 0..width {
            let column = |i: usize| x.chunks_exact(width).map(move |row| f64::from(row[i]));
            assert!((calibration.sums()[i] - column(i).sum::<f64>()).abs() < 1e-9);
            assert!((calibration.absolute_sums()[i] - column(i).map(f64::abs).sum::<f64>()).abs() < 1e-9);
            for j in 0..width {
                let exact: f64 = column(i).zip(column(j)).map(|(a, b)| a * b).sum();
                let size: f64 = column(i).zip(column(j)).map(|(a, b)| (a * b).abs()).sum();
                let value = calibration.second_moment().at(i, j);
                assert!((value - exact).abs() <= 1e-13 * size, "{i} {j}: {value} {exact}");
            }
        }
    }

    #[test]
    fn neither_the_cut_into_calls_nor_the_threads_change_a_bit() {
        let (tokens, width) = (1111, 130);
        let x = rows(tokens, width);
        let whole = sum(&x, width, &[], 1);
        for (cuts, threads) in [(vec![1; 700], 1), (vec![511, 1, 2], 3), (vec![0, 513, 512], 2), (vec![], 4)] {
            assert_eq!(sum(&x, width, &cuts, threads), whole);
        }
    }

    #[test]
    fn merging_equals_summing_all() {
        let (tokens, width) = (1024, 33);
        let x = rows(tokens, width);
        let mut left = sum(&x[..700 * width], width, &[], 1);
        left.merge(&sum(&x[700 * width..], width, &[], 1), 1.0).unwrap();
        let whole = sum(&x, width, &[], 1);
        assert_eq!(left.tokens(), whole.tokens());
        let trace: f64 = whole.energies().iter().sum();
        for i in 0..width {
            for (a, b) in left.second_moment().row(i).iter().zip(whole.second_moment().row(i)) {
                assert!((a - b).abs() <= 1e-13 * trace);
            }
        }
        let before = left.clone();
        let error = left.merge(&CalibrationBuilder::new(32).finish(&ThreadPool::with_threads(1)), 1.0).unwrap_err();
        assert_eq!(error.code, ErrorCode::ShapeMismatch);
        assert_eq!(left, before);
    }

    #[test]
    fn weights_count_tokens_more_than_once() {
        let pool = ThreadPool::with_threads(2);
        let (width, weights) = (41, [3.0, 0.5, 2.0]);
        let x = rows(700, width);
        let parts: Vec<&[f32]> = x.chunks(250 * width).collect();
        let mut builder = CalibrationBuilder::new(width);
        let (mut merged, mut expected) = (Calibration::zeros(width), CalibrationBuilder::new(width));
        for (part, weight) in parts.iter().zip(weights) {
            builder.weigh(weight, &pool);
            builder.push(part, &pool).unwrap();
            merged.merge(&sum(part, width, &[], 1), weight).unwrap();
            // Twice the weights are whole numbers: each vector as often as that.
            (0..(2.0 * weight) as usize).for_each(|_| expected.push(part, &pool).unwrap());
        }
        let (streamed, expected) = (builder.finish(&pool), expected.finish(&pool));
        for found in [&streamed, &merged] {
            assert_eq!(found.tokens(), 700, "tokens are counted once");
            let near = |a: f64, b: f64, size: f64| assert!((2.0 * a - b).abs() <= 1e-12 * size, "{a} {b}");
            let energies = expected.energies();
            for i in 0..width {
                near(found.sums()[i], expected.sums()[i], expected.absolute_sums()[i]);
                near(found.absolute_sums()[i], expected.absolute_sums()[i], expected.absolute_sums()[i]);
                for j in i..width {
                    let size = (energies[i] * energies[j]).sqrt();
                    near(found.second_moment().at(i, j), expected.second_moment().at(i, j), size);
                }
            }
        }
    }

    #[test]
    fn broken_rows_are_refused_and_add_nothing() {
        let pool = ThreadPool::with_threads(1);
        let mut builder = CalibrationBuilder::new(3);
        builder.push(&[1.0; 9], &pool).unwrap();
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let error = builder.push(&[0.0, 1.0, 2.0, 3.0, bad, 5.0], &pool).unwrap_err();
            assert_eq!(error.code, ErrorCode::ValueNotFinite);
            assert!(error.message.contains("token 4") && error.message.contains("input 1"), "{}", error.message);
        }
        assert_eq!(builder.push(&[1.0; 4], &pool).unwrap_err().code, ErrorCode::ShapeMismatch);
        let calibration = builder.finish(&pool);
        assert_eq!((calibration.tokens(), calibration.second_moment().to_symmetric()), (3, vec![3.0; 9]));
    }
}
