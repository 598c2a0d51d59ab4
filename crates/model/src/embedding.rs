use kintsugi_runtime::{Error, ErrorCode, Result};
use kintsugi_weights::{DenseMatrix, WeightMatrix};

/// What the residual stream of a token starts with.
#[derive(Clone, Debug)]
pub struct Embedding {
    /// `[vocabularySize, hiddenSize]`, floats or codes.
    pub tokens: WeightMatrix,
    /// `[contextLength, hiddenSize]`, where positions are learned.
    pub positions: Option<DenseMatrix>,
    /// What rows of tokens are multiplied with.
    pub scale: f32,
}

impl Embedding {
    /// `[tokens.len(), hiddenSize]` for tokens at positions.
    ///
    /// # Errors
    /// `ERR_INTERNAL` for a token outside the vocabulary or a position outside the context.
    pub fn embed(&self, tokens: &[u32], positions: &[u32]) -> Result<Vec<f32>> {
        let width = self.tokens.columns();
        let mut out = vec![0.0; tokens.len() * width];
        let mut offset = vec![0.0; width];
        for ((&token, &position), row) in tokens.iter().zip(positions).zip(out.chunks_exact_mut(width)) {
            if token as usize >= self.tokens.rows() {
                return Err(Error::new(ErrorCode::Internal, format!("token {token} is outside the vocabulary")));
            }
            self.tokens.row_to_f32(token as usize, row);
            row.iter_mut().for_each(|value| *value *= self.scale);
            if let Some(learned) = &self.positions {
                if position as usize >= learned.rows() {
                    return Err(Error::new(ErrorCode::Internal, format!("position {position} is outside the context")));
                }
                learned.row_to_f32(position as usize, &mut offset);
                row.iter_mut().zip(&offset).for_each(|(value, offset)| *value += offset);
            }
        }
        Ok(out)
    }

    /// Bytes of the matrices.
    pub fn memory_bytes(&self) -> usize {
        let bytes = |matrix: &DenseMatrix| matrix.rows() * matrix.columns() * matrix.element_type().bits() / 8;
        let tokens = match &self.tokens {
            WeightMatrix::Dense(matrix) => bytes(matrix),
            // In memory a code takes a byte, a scale or an offset four.
            WeightMatrix::Quantized(matrix) => {
                let offsets = matrix.offsets().map_or(0, <[f32]>::len);
                matrix.codes().len() + 4 * (matrix.scales().len() + offsets)
            }
        };
        tokens + self.positions.as_ref().map_or(0, bytes)
    }
}
