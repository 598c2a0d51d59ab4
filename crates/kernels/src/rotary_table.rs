/// Cosines and sines of rotary position embedding (arXiv 2104.09864), in the half-split convention of Hugging Face:
/// dimension `i` of a head turns with dimension `i + headDim/2`, by the angle `position · theta^(−2i/headDim)`.
#[derive(Clone, Debug)]
pub struct RotaryTable {
    head_dim: usize,
    /// `[positions, head_dim / 2]`
    cosines: Vec<f32>,
    /// `[positions, head_dim / 2]`
    sines: Vec<f32>,
}

impl RotaryTable {
    /// A table of the first `positions` positions. Angles are computed in f64.
    ///
    /// # Panics
    /// When `head_dim` is odd or zero.
    pub fn new(head_dim: usize, theta: f64, positions: usize) -> Self {
        assert!(head_dim > 0 && head_dim.is_multiple_of(2), "a head of {head_dim} dimensions has no halves");
        let half = head_dim / 2;
        let frequencies: Vec<f64> = (0..half).map(|i| theta.powf(-2.0 * i as f64 / head_dim as f64)).collect();
        let mut cosines = Vec::with_capacity(positions * half);
        let mut sines = Vec::with_capacity(positions * half);
        for position in 0..positions {
            for frequency in &frequencies {
                let (sine, cosine) = (position as f64 * frequency).sin_cos();
                cosines.push(cosine as f32);
                sines.push(sine as f32);
            }
        }
        RotaryTable { head_dim, cosines, sines }
    }

    /// Dimensions of a head.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Number of positions; the last is one less.
    pub fn positions(&self) -> usize {
        self.cosines.len() / (self.head_dim / 2)
    }

    /// Cosines and sines of a position.
    pub(crate) fn row(&self, position: usize) -> (&[f32], &[f32]) {
        let half = self.head_dim / 2;
        let range = position * half..(position + 1) * half;
        (&self.cosines[range.clone()], &self.sines[range])
    }
}

/// Turns every head of one row.
#[inline(always)]
pub(crate) fn rotate(cosines: &[f32], sines: &[f32], heads: &mut [f32]) {
    let half = cosines.len();
    for head in heads.chunks_exact_mut(2 * half) {
        let (first, second) = head.split_at_mut(half);
        for (((first, second), cosine), sine) in first.iter_mut().zip(second).zip(cosines).zip(sines) {
            (*first, *second) = (*first * cosine - *second * sine, *second * cosine + *first * sine);
        }
    }
}
