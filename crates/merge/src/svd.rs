use kintsugi_runtime::{Result, ThreadPool};

use crate::spectrum::Spectrum;
use crate::{FactorUpdate, LinearSources, MergeMethod, MergeOptions, RankRule, Solution, UnitStack};

/// The best approximation of the weighted sum at a rank: its truncated singular value decomposition (Eckart and Young
/// 1936; `svd` of peft), found in the small core of the factors and never from a dense update.
#[derive(Clone, Copy, Debug)]
pub struct Svd;

impl MergeMethod for Svd {
    fn name(&self) -> &'static str {
        "svd"
    }

    fn summary(&self) -> &'static str {
        "the closest to the weighted sum that the rank allows"
    }

    fn options(&self) -> &'static [&'static str] {
        &[]
    }

    fn merges_one(&self) -> bool {
        true
    }

    fn rank_of(&self, ranks: &[usize], smaller_side: usize) -> usize {
        ranks.iter().sum::<usize>().min(smaller_side)
    }

    fn solve(&self, linear: &LinearSources<'_>, options: &MergeOptions, pool: &ThreadPool) -> Result<Solution> {
        let rule = options.rank.unwrap_or(RankRule::Fixed(linear.largest_rank()));
        truncated(linear.stack(), rule, pool).map(Solution::plain)
    }
}

/// The truncated singular value decomposition of the sum of `stack`, both factors of a term of equal norm.
pub(crate) fn truncated(stack: &UnitStack, rule: RankRule, pool: &ThreadPool) -> Result<FactorUpdate> {
    let spectrum = Spectrum::new(stack, pool)?;
    let directions = spectrum.directions(pool)?;
    let rank = rule.pick(&directions.values, directions.energy);
    Ok(spectrum.lift(directions.balanced(rank, pool), pool))
}

/// The number of terms that `rule` asks for.
pub(crate) fn rank_for(linear: &LinearSources<'_>, rule: Option<RankRule>, pool: &ThreadPool) -> Result<usize> {
    match rule {
        None => Ok(linear.largest_rank()),
        Some(RankRule::Fixed(rank)) => Ok(rank),
        Some(rule) => {
            let spectrum = Spectrum::new(linear.stack(), pool)?;
            let directions = spectrum.directions(pool)?;
            Ok(rule.pick(&directions.values, directions.energy))
        }
    }
}
