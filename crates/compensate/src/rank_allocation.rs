use std::cmp::Ordering;
use std::collections::BinaryHeap;

use kintsugi_runtime::{Error, ErrorCode, Result};
use serde::{Deserialize, Serialize};

use crate::FactorStorage;

/// How much all compensations of a model may take together.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum RankBudget {
    /// The bytes of that rank in every Linear.
    MeanRank(f64),
    /// So many bytes.
    Bytes(u64),
}

/// Between which ranks a budget is divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RankLimits {
    /// Ranks are multiples of it, as kernels read them: at the end of what a Linear has, the rest.
    pub multiple: usize,
    /// Every Linear gets at least this much.
    pub min: usize,
    /// And at most this.
    pub max: usize,
}

/// What ranks are worth to one Linear.
#[derive(Clone, Debug, PartialEq)]
pub struct RankCandidate {
    /// Error energies of the prefixes 0, 1, … of its factors.
    pub energies: Vec<f64>,
    /// What an energy counts beside those of others.
    pub weight: f64,
    /// Outputs and inputs.
    pub shape: (usize, usize),
    /// What its update is stored in.
    pub storage: FactorStorage,
}

impl RankCandidate {
    /// Bits of its update.
    fn bits(&self, rank: usize) -> u64 {
        self.storage.stored_bits(self.shape.0, self.shape.1, rank)
    }

    /// Its largest rank.
    fn largest(&self, limits: RankLimits) -> usize {
        self.energies.len().saturating_sub(1).min(limits.max)
    }
}

/// Divides a budget over Linears, each step of rank where it removes the most error per bit.
///
/// The gain of a rank is the energy of its direction, and gains of one Linear do not grow, so taking the largest one
/// next is optimal for the sum. Where rounding, or a bias that comes with the first rank, makes a later step worth more
/// than the one before, both go together.
///
/// # Errors
/// `ERR_OPTION_INVALID` for limits that exclude each other.
pub fn allocate_ranks(candidates: &[RankCandidate], budget: RankBudget, limits: RankLimits) -> Result<Vec<usize>> {
    if limits.multiple == 0 || limits.min > limits.max {
        let message = format!(
            "ranks from {} to {} in steps of {} cannot be chosen from",
            limits.min, limits.max, limits.multiple
        );
        return Err(Error::new(ErrorCode::OptionInvalid, message)
            .subject("eora.minRank")
            .hint("Use a positive step, and a least rank below the largest one"));
    }
    let total: u128 = match budget {
        RankBudget::MeanRank(mean) => {
            let (below, part) = (mean.max(0.0).floor(), mean.max(0.0).fract());
            let all = |rank: f64| candidates.iter().map(|c| c.bits(rank as usize) as f64).sum::<f64>();
            (all(below) + part * (all(below + 1.0) - all(below))).floor() as u128
        }
        RankBudget::Bytes(bytes) => u128::from(bytes) * 8,
    };
    let mut ranks: Vec<usize> = candidates.iter().map(|candidate| candidate.largest(limits).min(limits.min)).collect();
    let cost = |place: usize, rank: usize| u128::from(candidates[place].bits(rank));
    let mut spent: u128 = ranks.iter().enumerate().map(|(place, &rank)| cost(place, rank)).sum();
    let mut open: BinaryHeap<Step> = (0..candidates.len())
        .filter_map(|place| best_step(candidates, place, ranks[place], limits, u128::MAX))
        .collect();
    while let Some(step) = open.pop() {
        let (place, more) = (step.place, cost(step.place, step.to) - cost(step.place, ranks[step.place]));
        let left = total.saturating_sub(spent);
        if more <= left {
            spent += more;
            ranks[place] = step.to;
        }
        // Of a step that is too large a part may fit.
        let room = if more <= left { u128::MAX } else { left };
        open.extend(best_step(candidates, place, ranks[place], limits, room));
    }
    Ok(ranks)
}

/// A Linear's next ranks.
struct Step {
    place: usize,
    to: usize,
    /// Weighted energy per bit.
    gain: f64,
}

/// The step from a rank on that removes the most energy per bit, of those that take no more bits than there is room
/// for; the first of equals.
fn best_step(candidates: &[RankCandidate], place: usize, from: usize, limits: RankLimits, room: u128) -> Option<Step> {
    let candidate = &candidates[place];
    let largest = candidate.largest(limits);
    let mut best: Option<Step> = None;
    let mut to = from;
    while to < largest {
        to = ((to / limits.multiple + 1) * limits.multiple).min(largest);
        let removed = (candidate.energies[from] - candidate.energies[to]) * candidate.weight;
        let bits = candidate.bits(to) - candidate.bits(from);
        let gain = removed / bits as f64;
        if u128::from(bits) <= room && gain > best.as_ref().map_or(0.0, |best| best.gain) {
            best = Some(Step { place, to, gain });
        }
    }
    best
}

impl Ord for Step {
    fn cmp(&self, other: &Self) -> Ordering {
        self.gain.total_cmp(&other.gain).then(other.place.cmp(&self.place))
    }
}

impl PartialOrd for Step {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Step {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Step {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::FactorPrecision;

    /// One whose ranks take `size` times 16 bits.
    fn candidate(gains: &[f64], weight: f64, size: usize) -> RankCandidate {
        let mut energies = vec![gains.iter().sum::<f64>() + 1.0];
        gains.iter().for_each(|gain| energies.push(energies[energies.len() - 1] - gain));
        RankCandidate { energies, weight, shape: (size, 0), storage: FactorStorage::default() }
    }

    fn limits(multiple: usize, min: usize, max: usize) -> RankLimits {
        RankLimits { multiple, min, max }
    }

    fn left(candidates: &[RankCandidate], ranks: &[usize]) -> f64 {
        candidates.iter().zip(ranks).map(|(c, &rank)| c.energies[rank] * c.weight).sum()
    }

    #[test]
    fn with_equal_costs_no_division_is_better() {
        let candidates = [
            candidate(&[9.0, 4.0, 1.0, 0.5], 1.0, 1),
            candidate(&[7.0, 6.0, 5.0], 0.5, 1),
            candidate(&[2.0, 2.0, 2.0, 2.0, 2.0], 1.0, 1),
        ];
        for budget in 0..=12usize {
            let found = allocate_ranks(&candidates, RankBudget::Bytes(2 * budget as u64), limits(1, 0, 64)).unwrap();
            assert!(found.iter().sum::<usize>() <= budget);
            let mut best = f64::INFINITY;
            for a in 0..=4 {
                for b in 0..=3 {
                    for c in 0..=5 {
                        if a + b + c <= budget {
                            best = best.min(left(&candidates, &[a, b, c]));
                        }
                    }
                }
            }
            assert_eq!(left(&candidates, &found), best, "{budget}: {found:?}");
        }
    }

    #[test]
    fn costs_limits_and_steps_are_kept() {
        let gains: Vec<f64> = (0..20).map(|i| 10.0 / f64::from(1 + i)).collect();
        let candidates = [candidate(&gains, 1.0, 100), candidate(&gains, 1.0, 10), candidate(&[], 1.0, 10)];
        let ranks = allocate_ranks(&candidates, RankBudget::MeanRank(8.0), limits(8, 4, 19)).unwrap();
        assert!(ranks[1] > ranks[0] && ranks[2] == 0, "{ranks:?}");
        assert!(ranks[0] * 100 + ranks[1] * 10 <= 8 * 120);
        assert!(ranks[..2].iter().all(|&rank| rank == 4 || rank % 8 == 0 || rank == 19), "{ranks:?}");
        let all = allocate_ranks(&candidates, RankBudget::Bytes(1 << 30), limits(8, 0, 64)).unwrap();
        assert_eq!(all, [20, 20, 0]);
        for wrong in [limits(0, 0, 4), limits(8, 9, 8)] {
            let error = allocate_ranks(&candidates, RankBudget::Bytes(0), wrong).unwrap_err();
            assert_eq!(error.code, ErrorCode::OptionInvalid);
        }
    }

    #[test]
    fn scales_that_ranks_share_are_paid_once() {
        let gains = vec![1.0; 100];
        let storage = FactorStorage { precision: FactorPrecision::Codes(4), affine: false };
        let coded = |_| RankCandidate { storage, ..candidate(&gains, 1.0, 64) };
        let candidates: Vec<RankCandidate> = (0..4).map(coded).collect();
        for bytes in [100, 1000, 4000, 9000] {
            let ranks = allocate_ranks(&candidates, RankBudget::Bytes(bytes), limits(8, 0, 100)).unwrap();
            let bits: u64 = candidates.iter().zip(&ranks).map(|(candidate, &rank)| candidate.bits(rank)).sum();
            assert!(bits <= bytes * 8, "{bytes}: {ranks:?}");
            assert!(bytes < 4000 || ranks.contains(&64), "{bytes}: {ranks:?}");
            assert!(bytes < 1000 || ranks.iter().any(|&rank| rank >= 8), "{bytes}: {ranks:?}");
        }
    }

    #[test]
    fn a_bias_is_paid_with_the_first_rank() {
        let affine = FactorStorage { affine: true, ..FactorStorage::default() };
        let candidates = [
            RankCandidate { storage: affine, ..candidate(&[9.0, 1.0, 1.0], 1.0, 1) },
            RankCandidate { storage: affine, ..candidate(&[1.0, 1.0], 1.0, 1) },
        ];
        // A rank takes 2 bytes, a bias 4.
        for (bytes, expected) in [(5, [0, 0]), (6, [1, 0]), (10, [3, 0]), (15, [3, 0]), (16, [3, 1]), (18, [3, 2])] {
            let ranks = allocate_ranks(&candidates, RankBudget::Bytes(bytes), limits(1, 0, 9)).unwrap();
            assert_eq!(ranks, expected, "{bytes}");
        }
    }

    #[test]
    fn ranks_that_remove_nothing_cost_nothing() {
        let candidates = [candidate(&[1.0, 0.0, -0.5, 3.0], 1.0, 1), candidate(&[0.0; 3], 1.0, 1)];
        let ranks = allocate_ranks(&candidates, RankBudget::Bytes(100), limits(1, 0, 9)).unwrap();
        assert_eq!(ranks, [4, 0], "what comes behind a bad step may pay for it");
    }
}
