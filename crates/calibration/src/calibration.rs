use kintsugi_linalg::UpperTriangle;
use kintsugi_runtime::{Error, ErrorCode, Result};

/// Unweighted sums over the input vectors x (one per token) of one Linear, in f64.
#[derive(Clone, Debug, PartialEq)]
pub struct Calibration {
    pub(crate) width: usize,
    pub(crate) tokens: u64,
    pub(crate) second_moment: UpperTriangle<f64>,
    pub(crate) sums: Vec<f64>,
    pub(crate) absolute_sums: Vec<f64>,
}

impl Calibration {
    /// Bytes of the statistics of `width` inputs.
    pub fn bytes(width: usize) -> u64 {
        UpperTriangle::<f64>::bytes(width) + 16 * width as u64
    }

    /// Sums that were kept somewhere else. The width is that of the second moment.
    ///
    /// # Errors
    /// `ERR_SHAPE_MISMATCH` when the lengths differ.
    pub fn new(
        tokens: u64,
        second_moment: UpperTriangle<f64>,
        sums: Vec<f64>,
        absolute_sums: Vec<f64>,
    ) -> Result<Self> {
        let width = second_moment.side();
        if sums.len() != width || absolute_sums.len() != width {
            let message =
                format!("second moments of {width} inputs with sums of {} and {}", sums.len(), absolute_sums.len());
            return Err(Error::new(ErrorCode::ShapeMismatch, message).subject("Calibration"));
        }
        Ok(Calibration { width, tokens, second_moment, sums, absolute_sums })
    }

    /// Length of an input vector: `inFeatures` of the Linear.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Number of vectors that were summed.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// `S = Σ x xᵀ`, `[width, width]`. Not centred, not divided by the tokens.
    pub fn second_moment(&self) -> &UpperTriangle<f64> {
        &self.second_moment
    }

    /// `S_jj = Σ x_j²`, `[width]`: the diagonal of the second moment.
    pub fn energies(&self) -> Vec<f64> {
        self.second_moment.diagonal()
    }

    /// `Σ x`, `[width]`.
    pub fn sums(&self) -> &[f64] {
        &self.sums
    }

    /// `Σ |x|`, `[width]`.
    pub fn absolute_sums(&self) -> &[f64] {
        &self.absolute_sums
    }

    /// Adds the sums of other tokens of the same Linear.
    ///
    /// # Errors
    /// `ERR_SHAPE_MISMATCH` when the widths differ; nothing is changed then.
    pub fn merge(&mut self, other: &Calibration) -> Result<()> {
        if self.width != other.width {
            let message = format!("sums over {} inputs cannot be added to sums over {}", other.width, self.width);
            return Err(Error::new(ErrorCode::ShapeMismatch, message)
                .subject("Calibration")
                .hint("Merge only statistics of the same Linear"));
        }
        self.tokens += other.tokens;
        let add = |sums: &mut [f64], others: &[f64]| sums.iter_mut().zip(others).for_each(|(sum, other)| *sum += other);
        (0..self.width).for_each(|i| add(self.second_moment.row_mut(i), other.second_moment.row(i)));
        add(&mut self.sums, &other.sums);
        add(&mut self.absolute_sums, &other.absolute_sums);
        Ok(())
    }
}
