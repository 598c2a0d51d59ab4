/// Cosines and sines by which the rows of a batch turn in rotary position embedding (arXiv 2104.09864), in the
/// half-split convention of Hugging Face: dimension `i` of a head turns with dimension `i + rotaryDim/2`, and the
/// dimensions from `rotaryDim` on stay as they are.
#[derive(Clone, Debug)]
pub struct RotaryTable {
    half: usize,
    /// `[rows, half]`
    cosines: Vec<f32>,
    /// `[rows, half]`
    sines: Vec<f32>,
}

impl RotaryTable {
    /// A table without rows for `half` pairs of dimensions.
    pub fn new(half: usize) -> Self {
        RotaryTable { half, cosines: Vec::new(), sines: Vec::new() }
    }

    /// Appends the row of a position: pair `i` turns by the angle `position · frequencies[i]` and grows by `scale`.
    /// Angles are computed in f64.
    ///
    /// # Panics
    /// When there is not one frequency per pair.
    pub fn push(&mut self, position: u32, frequencies: &[f64], scale: f64) {
        assert_eq!(frequencies.len(), self.half, "a row has one frequency per pair");
        for frequency in frequencies {
            let (sine, cosine) = (f64::from(position) * frequency).sin_cos();
            self.cosines.push((cosine * scale) as f32);
            self.sines.push((sine * scale) as f32);
        }
    }

    /// Pairs of dimensions that turn: half of `rotaryDim`.
    pub fn half(&self) -> usize {
        self.half
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.cosines.len().checked_div(self.half).unwrap_or(0)
    }

    /// `[rows, half]`
    pub fn cosines(&self) -> &[f32] {
        &self.cosines
    }

    /// `[rows, half]`
    pub fn sines(&self) -> &[f32] {
        &self.sines
    }

    /// Cosines and sines of a row.
    pub(crate) fn row(&self, row: usize) -> (&[f32], &[f32]) {
        let range = row * self.half..(row + 1) * self.half;
        (&self.cosines[range.clone()], &self.sines[range])
    }
}

/// Turns every head of one row.
#[inline(always)]
pub(crate) fn rotate(cosines: &[f32], sines: &[f32], head_dim: usize, heads: &mut [f32]) {
    let half = cosines.len();
    for head in heads.chunks_exact_mut(head_dim) {
        let (first, second) = head[..2 * half].split_at_mut(half);
        for (((first, second), cosine), sine) in first.iter_mut().zip(second).zip(cosines).zip(sines) {
            (*first, *second) = (*first * cosine - *second * sine, *second * cosine + *first * sine);
        }
    }
}
