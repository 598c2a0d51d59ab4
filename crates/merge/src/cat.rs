use kintsugi_runtime::{Result, ThreadPool};

use crate::{FactorUpdate, LinearSources, MergeMethod, MergeOptions, Solution};

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

    fn rank_of(&self, ranks: &[usize], _smaller_side: usize) -> usize {
        ranks.iter().sum()
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
