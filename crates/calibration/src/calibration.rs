use kintsugi_linalg::UpperTriangle;
use kintsugi_runtime::{Error, ErrorCode, Result};

/// Sums over the input vectors x (one per token) of one Linear, in f64. A mixture counts the tokens of each source with
/// a weight; otherwise every weight is one.
#[derive(Clone, Debug, PartialEq)]
pub struct Calibration {
    pub(crate) width: usize,
    pub(crate) tokens: u64,
    /// What all vectors count together.
    pub(crate) weight: f64,
    pub(crate) second_moment: UpperTriangle<f64>,
    pub(crate) sums: Vec<f64>,
    pub(crate) absolute_sums: Vec<f64>,
}

/// A part of the sums of one Linear.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SumPart {
    /// A row of the second moment, from its diagonal element on.
    SecondMoment(usize),
    /// `Σ x`
    Sums,
    /// `Σ |x|`
    AbsoluteSums,
}

impl Calibration {
    /// Sums over no vectors of length `width`.
    pub fn zeros(width: usize) -> Self {
        Calibration {
            width,
            tokens: 0,
            weight: 0.0,
            second_moment: UpperTriangle::zeros(width),
            sums: vec![0.0; width],
            absolute_sums: vec![0.0; width],
        }
    }

    /// Bytes of the statistics of `width` inputs.
    pub fn bytes(width: usize) -> u64 {
        UpperTriangle::<f64>::bytes(width) + 16 * width as u64
    }

    /// Sums that were kept somewhere else, of vectors that count once. The width is that of the second moment.
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
        Ok(Calibration { width, tokens, weight: tokens as f64, second_moment, sums, absolute_sums })
    }

    /// Length of an input vector: `inFeatures` of the Linear.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Number of vectors that were summed, whatever their weights.
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

    /// Adds the sums of other tokens of the same Linear, each of which counts `weight` times.
    ///
    /// # Errors
    /// `ERR_SHAPE_MISMATCH` when the widths differ; nothing is changed then.
    pub fn merge(&mut self, other: &Calibration, weight: f64) -> Result<()> {
        if self.width != other.width {
            let message = format!("sums over {} inputs cannot be added to sums over {}", other.width, self.width);
            return Err(Error::new(ErrorCode::ShapeMismatch, message)
                .subject("Calibration")
                .hint("Merge only statistics of the same Linear"));
        }
        self.add((other.tokens, other.weight), weight, |part, out| {
            out.copy_from_slice(match part {
                SumPart::SecondMoment(row) => other.second_moment.row(row),
                SumPart::Sums => &other.sums,
                SumPart::AbsoluteSums => &other.absolute_sums,
            });
            Ok(())
        })
    }

    /// Adds sums that lie somewhere else, part by part: `read` writes one. They are of so many tokens, which count
    /// `counted` together in them, and count `weight` times that here.
    ///
    /// # Errors
    /// What `read` reports; the parts before have been added then.
    pub fn add(
        &mut self,
        (tokens, counted): (u64, f64),
        weight: f64,
        mut read: impl FnMut(SumPart, &mut [f64]) -> Result<()>,
    ) -> Result<()> {
        let mut scratch = vec![0.0; self.width];
        let mut add = |part: SumPart, sums: &mut [f64]| {
            let found = &mut scratch[..sums.len()];
            read(part, found)?;
            sums.iter_mut().zip(found).for_each(|(sum, value)| *sum += weight * *value);
            Ok(())
        };
        (0..self.width).try_for_each(|i| add(SumPart::SecondMoment(i), self.second_moment.row_mut(i)))?;
        add(SumPart::Sums, &mut self.sums)?;
        add(SumPart::AbsoluteSums, &mut self.absolute_sums)?;
        self.tokens += tokens;
        self.weight += weight * counted;
        Ok(())
    }
}
