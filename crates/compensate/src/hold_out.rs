use kintsugi_linalg::{MatrixView, MatrixViewMut, Scalar, add_product};
use kintsugi_runtime::ThreadPool;

/// Inputs of a Linear that took no part in its statistics: `[tokens, width]`, row-major.
///
/// Errors are squares: an input that counts w times is kept as √w times itself.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HoldOut {
    width: usize,
    rows: Vec<f32>,
    /// √w of each token.
    factors: Vec<f32>,
}

impl HoldOut {
    /// Rows of a matrix that one task multiplies.
    const BAND: usize = 64;

    /// Inputs that count once each.
    ///
    /// # Panics
    /// When the number of values is not a multiple of `width`.
    pub fn new(width: usize, rows: Vec<f32>) -> Self {
        assert!(width > 0 && rows.len().is_multiple_of(width), "rows are [tokens, width]");
        let factors = vec![1.0; rows.len() / width];
        HoldOut { width, rows, factors }
    }

    /// Inputs that count as often as `weights` says, one for each.
    ///
    /// # Panics
    /// When the numbers of values and weights do not fit.
    pub fn weighted(width: usize, mut rows: Vec<f32>, weights: &[f64]) -> Self {
        assert!(width > 0 && rows.len() == weights.len() * width, "rows are [tokens, width], with a weight each");
        let factors: Vec<f32> = weights.iter().map(|weight| weight.sqrt() as f32).collect();
        for (row, factor) in rows.chunks_exact_mut(width).zip(&factors) {
            row.iter_mut().for_each(|value| *value *= factor);
        }
        HoldOut { width, rows, factors }
    }

    /// Length of an input.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Number of inputs.
    pub fn tokens(&self) -> usize {
        self.rows.len() / self.width.max(1)
    }

    /// Both halves, by tokens.
    pub(crate) fn halves(&self) -> [HoldOut; 2] {
        let half = self.tokens() / 2;
        let (rows, factors) = (self.rows.split_at(half * self.width), self.factors.split_at(half));
        let of = |rows: &[f32], factors: &[f32]| HoldOut {
            width: self.width,
            rows: rows.to_vec(),
            factors: factors.to_vec(),
        };
        [of(rows.0, factors.0), of(rows.1, factors.1)]
    }

    /// The same tokens with the values of both, one after the other: `[tokens, width + other.width]`.
    pub(crate) fn beside(&self, other: &HoldOut) -> HoldOut {
        let width = self.width + other.width;
        let pairs = self.rows.chunks_exact(self.width.max(1)).zip(other.rows.chunks_exact(other.width.max(1)));
        let rows = pairs.flat_map(|(left, right)| [left, right].concat()).collect();
        HoldOut { width, rows, factors: self.factors.clone() }
    }

    /// The same inputs less a mean.
    pub(crate) fn minus(&self, mean: &[f64]) -> HoldOut {
        let mut less = self.clone();
        for (row, &factor) in less.rows.chunks_exact_mut(self.width.max(1)).zip(&self.factors) {
            let change =
                |(value, mean): (&mut f32, &f64)| *value = (f64::from(*value) - f64::from(factor) * mean) as f32;
            row.iter_mut().zip(mean).for_each(change);
        }
        less
    }

    /// `[tokens, width]` in f64.
    pub(crate) fn wide(&self) -> Vec<f64> {
        self.rows.iter().map(|&value| f64::from(value)).collect()
    }

    /// `‖M X‖²` of a matrix whose row `i` is written by `fill(i, row)`: products in the type of the rows, sums of squares
    /// in f64.
    pub(crate) fn energy<T: Scalar>(
        &self,
        rows: usize,
        fill: impl Fn(usize, &mut [T]) + Sync + Send,
        narrow: impl Fn(f32) -> T,
        pool: &ThreadPool,
    ) -> f64 {
        let (tokens, width) = (self.tokens(), self.width);
        let inputs: Vec<T> = self.rows.iter().map(|&value| narrow(value)).collect();
        let inputs = MatrixView::new(&inputs, tokens, width).transposed();
        let bands = pool.map(rows.div_ceil(Self::BAND), |index| {
            let height = Self::BAND.min(rows - index * Self::BAND);
            let mut band = vec![T::ZERO; height * width];
            band.chunks_exact_mut(width).enumerate().for_each(|(i, row)| fill(index * Self::BAND + i, row));
            let mut outputs = vec![T::ZERO; height * tokens];
            let out = MatrixViewMut::new(&mut outputs, height, tokens);
            add_product(out, MatrixView::new(&band, height, width), inputs);
            outputs.iter().map(|&value| value.wide().powi(2)).sum::<f64>()
        });
        bands.iter().sum()
    }
}
