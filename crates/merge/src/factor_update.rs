use kintsugi_linalg::transposed;
use kintsugi_weights::{ElementType, LowRank};

/// An update `Σ bⱼ aⱼᵀ` in f64, term by term.
#[derive(Clone, Debug, PartialEq)]
pub struct FactorUpdate {
    /// Length of a b.
    pub out_features: usize,
    /// Length of an a.
    pub in_features: usize,
    /// `[rank, out]`.
    pub b: Vec<f64>,
    /// `[rank, in]`.
    pub a: Vec<f64>,
}

impl FactorUpdate {
    /// Number of terms.
    pub fn rank(&self) -> usize {
        self.b.len().checked_div(self.out_features).unwrap_or(0)
    }

    /// Multiplies term `index` with `factor`, on the side of b.
    pub(crate) fn scale_b(&mut self, index: usize, factor: f64) {
        let range = index * self.out_features..(index + 1) * self.out_features;
        self.b[range].iter_mut().for_each(|value| *value *= factor);
    }

    /// Multiplies both sides of term `index` with `factor`.
    pub(crate) fn scale_both(&mut self, index: usize, factor: f64) {
        self.scale_b(index, factor);
        let range = index * self.in_features..(index + 1) * self.in_features;
        self.a[range].iter_mut().for_each(|value| *value *= factor);
    }

    /// The terms in another order.
    pub(crate) fn reordered(&self, order: &[usize]) -> Self {
        let take = |values: &[f64], width: usize| -> Vec<f64> {
            order.iter().flat_map(|&i| &values[i * width..(i + 1) * width]).copied().collect()
        };
        FactorUpdate {
            out_features: self.out_features,
            in_features: self.in_features,
            b: take(&self.b, self.out_features),
            a: take(&self.a, self.in_features),
        }
    }

    /// Squared norms of the b and of the a of a term.
    pub(crate) fn norms(&self, index: usize) -> (f64, f64) {
        let norm = |values: &[f64], width: usize| -> f64 {
            values[index * width..(index + 1) * width].iter().map(|value| value * value).sum()
        };
        (norm(&self.b, self.out_features), norm(&self.a, self.in_features))
    }

    /// The factors rounded to the type that is stored.
    pub(crate) fn to_low_rank(&self, factor_type: ElementType) -> LowRank {
        let narrow = |values: &[f64]| -> Vec<f32> { values.iter().map(|&value| value as f32).collect() };
        let rank = self.rank();
        let b = transposed(&narrow(&self.b), rank, self.out_features);
        LowRank::new(self.out_features, self.in_features, rank, b, narrow(&self.a), factor_type)
    }
}
