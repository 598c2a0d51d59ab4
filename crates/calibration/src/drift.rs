use kintsugi_linalg::UpperTriangle;

/// How far the inputs of a Linear have drifted from those of the dense model, in f64: sums over the differences
/// `d = x − x̂` between what a token is in the dense model and in the deployed one.
///
/// With `S = Σ x̂ x̂ᵀ` of [`Calibration`](crate::Calibration) they hold all second moments of both inputs:
/// `Σ x x̂ᵀ = S + D` and `Σ x xᵀ = S + D + Dᵀ + E`. Sums over differences instead of those lose nothing where the
/// two are close.
#[derive(Clone, Debug, PartialEq)]
pub struct Drift {
    pub(crate) width: usize,
    pub(crate) tokens: u64,
    pub(crate) cross: Vec<f64>,
    pub(crate) square: UpperTriangle<f64>,
}

impl Drift {
    /// Sums over no pairs of vectors of length `width`.
    pub fn zeros(width: usize) -> Self {
        Drift { width, tokens: 0, cross: vec![0.0; width * width], square: UpperTriangle::zeros(width) }
    }

    /// Bytes of the drift of `width` inputs.
    pub fn bytes(width: usize) -> u64 {
        8 * (width as u64).pow(2) + UpperTriangle::<f64>::bytes(width)
    }

    /// Length of an input vector.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Number of pairs, whatever their weights.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// `D = Σ (x − x̂) x̂ᵀ`, `[width, width]` row-major: the cross moment of both inputs less the second moment of the
    /// deployed ones.
    pub fn cross(&self) -> &[f64] {
        &self.cross
    }

    /// `E = Σ (x − x̂)(x − x̂)ᵀ`, `[width, width]`.
    pub fn square(&self) -> &UpperTriangle<f64> {
        &self.square
    }

    /// Whether every token is the same in both models.
    pub fn is_zero(&self) -> bool {
        (0..self.width).all(|i| self.square.row(i)[0] == 0.0)
    }
}
