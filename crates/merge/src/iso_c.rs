use kintsugi_runtime::{Result, ThreadPool};

use crate::spectrum::Spectrum;
use crate::{LinearSources, MergeMethod, MergeOptions, RankRule, Solution};

/// Singular values below this share of the largest are no directions of the sum.
const NOISE: f64 = 1e-7;

/// Iso-C: the weighted sum with every singular value replaced by their mean (arXiv 2502.04959). The mean is over the
/// singular values that are not zero; the rank keeps the directions that were largest. The rule looks the same in the
/// coordinates of Core Space, because a rotation changes no singular value.
#[derive(Clone, Copy, Debug)]
pub struct IsoC;

impl MergeMethod for IsoC {
    fn name(&self) -> &'static str {
        "iso-c"
    }

    fn summary(&self) -> &'static str {
        "the weighted sum with all singular values made equal"
    }

    fn options(&self) -> &'static [&'static str] {
        &[]
    }

    fn rank_of(&self, ranks: &[usize], smaller_side: usize) -> usize {
        ranks.iter().sum::<usize>().min(smaller_side)
    }

    fn solve(&self, linear: &LinearSources<'_>, options: &MergeOptions, pool: &ThreadPool) -> Result<Solution> {
        let spectrum = Spectrum::new(linear.stack(), pool)?;
        let directions = spectrum.directions(pool)?;
        let largest = directions.values.first().copied().unwrap_or(0.0);
        let values: Vec<f64> = directions.values.iter().copied().take_while(|&v| v > NOISE * largest).collect();
        let rule = options.rank.unwrap_or(RankRule::Fixed(linear.largest_rank()));
        let rank = rule.pick(&directions.values, directions.energy).min(values.len());
        let mean = values.iter().sum::<f64>() / values.len().max(1) as f64;
        let mut update = spectrum.lift(directions.balanced(rank, pool), pool);
        for (term, value) in values.iter().enumerate().take(update.rank()) {
            update.scale_both(term, (mean / value).sqrt());
        }
        Ok(Solution::plain(update))
    }
}
