use kintsugi_linalg::transposed;
use kintsugi_runtime::{Result, ThreadPool};

use crate::{FactorUpdate, LinearSources, MergeMethod, MergeOptions, Solution};

/// Weighted sums of the A and of the B, each for itself (`linear` of peft): a rough approximation of the sum of the
/// updates, because products of factors of different adapters get into it. Exact where the adapters share one factor,
/// and the usual mean for checkpoints of one run (arXiv 2504.18580 averages those).
#[derive(Clone, Copy, Debug)]
pub struct Linear;

impl MergeMethod for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn summary(&self) -> &'static str {
        "sums of A and of B, for checkpoints of one run; not the sum of the updates"
    }

    fn options(&self) -> &'static [&'static str] {
        &[]
    }

    fn keeps_rank(&self) -> bool {
        true
    }

    fn rank_of(&self, ranks: &[usize], _smaller_side: usize) -> usize {
        ranks.iter().copied().max().unwrap_or(0)
    }

    /// `A' = Σ ±√|w s| A`, `B' = Σ √|w s| B`, the sign of w s on the side of A.
    fn solve(&self, linear: &LinearSources<'_>, _options: &MergeOptions, _pool: &ThreadPool) -> Result<Solution> {
        let rank = linear.common_rank(self.name())?;
        let (out_features, in_features) = (linear.out_features(), linear.in_features());
        let (mut b, mut a) = (vec![0.0; rank * out_features], vec![0.0; rank * in_features]);
        for source in linear.sources() {
            let coefficient = source.coefficient();
            let root = coefficient.abs().sqrt();
            let columns = transposed(source.factors.b(), out_features, rank);
            b.iter_mut().zip(&columns).for_each(|(sum, &value)| *sum += root * f64::from(value));
            let signed = root.copysign(coefficient);
            a.iter_mut().zip(source.factors.a()).for_each(|(sum, &value)| *sum += signed * f64::from(value));
        }
        Ok(Solution::plain(FactorUpdate { out_features, in_features, b, a }))
    }
}
