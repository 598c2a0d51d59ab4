use kintsugi_runtime::{Result, ThreadPool};
use kintsugi_weights::{ElementType, LowRank};

use crate::{FactorUpdate, LinearSources, MergeMethod, MergeOptions, MergeSource, Solution};

/// Concatenation: the exact sum, at the sum of the ranks (`cat` of peft; arXiv 2410.13025).
#[derive(Clone, Copy, Debug)]
pub struct Cat;

impl MergeMethod for Cat {
    fn name(&self) -> &'static str {
        "cat"
    }

    fn summary(&self) -> &'static str {
        "the exact weighted sum, at the sum of the ranks"
    }

    fn options(&self) -> &'static [&'static str] {
        &[]
    }

    fn merges_one(&self) -> bool {
        true
    }

    fn keeps_rank(&self) -> bool {
        true
    }

    fn is_exact(&self) -> bool {
        true
    }

    fn rank_of(&self, ranks: &[usize], _smaller_side: usize) -> usize {
        ranks.iter().sum()
    }

    fn factors(&self, linear: &LinearSources<'_>, factor_type: ElementType) -> Option<LowRank> {
        let (out_features, in_features) = (linear.out_features(), linear.in_features());
        let orders: Vec<Vec<usize>> = linear.sources().iter().map(MergeSource::unit_order).collect();
        let rank = orders.iter().map(Vec::len).sum::<usize>();
        let mut a = Vec::with_capacity(rank * in_features);
        for (source, order) in linear.sources().iter().zip(&orders) {
            let coefficient = source.coefficient();
            for &unit in order {
                let row = &source.factors.a()[unit * in_features..(unit + 1) * in_features];
                a.extend(row.iter().map(|&value| (f64::from(value) * coefficient) as f32));
            }
        }
        let mut b = Vec::with_capacity(out_features * rank);
        for i in 0..out_features {
            for (source, order) in linear.sources().iter().zip(&orders) {
                let row = &source.factors.b()[i * order.len()..(i + 1) * order.len()];
                b.extend(order.iter().map(|&unit| row[unit]));
            }
        }
        Some(LowRank::new(out_features, in_features, rank, b, a, factor_type))
    }

    /// B stays as it is, coefficients go into A: powers of two among them change no digit.
    fn solve(&self, linear: &LinearSources<'_>, _options: &MergeOptions, _pool: &ThreadPool) -> Result<Solution> {
        let stack = linear.stack();
        let a = stack.a.chunks_exact(stack.in_features).zip(&stack.coefficients);
        Ok(Solution::plain(FactorUpdate {
            out_features: stack.out_features,
            in_features: stack.in_features,
            b: stack.b.iter().map(|&value| f64::from(value)).collect(),
            a: a.flat_map(|(row, factor)| row.iter().map(move |&value| f64::from(value) * factor)).collect(),
        }))
    }
}
