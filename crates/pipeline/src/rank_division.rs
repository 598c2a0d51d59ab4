use kintsugi_compensate::{RankBudget, RankCandidate, RankProfile, allocate_ranks};
use kintsugi_runtime::Result;
use serde::Serialize;

use crate::AblationReport;
use crate::eora_recipe::{EoraRecipe, RankWeights};

/// The ranks that the Linears of a model get of a budget.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct RankDivision {
    /// For each unit.
    pub(crate) ranks: Vec<usize>,
    /// What was found about it.
    pub(crate) report: AllocationReport,
}

/// How a budget was divided, and what that is worth.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct AllocationReport {
    /// `allocated`, or `uniform` where ranks that differ were no better on inputs that took no part.
    pub chosen: &'static str,
    /// The one rank that takes no more than the budget.
    pub uniform_rank: usize,
    /// Mean of the ranks that were chosen, over the Linears.
    pub mean_rank: f64,
    /// Bytes of all factors in memory.
    pub bytes: u64,
    /// Whether errors are measured on inputs that took no part, or for lack of them on the calibration inputs.
    pub held_out: bool,
    /// Error of all outputs with one rank, relative and weighted as asked; on inputs that did not decide either.
    pub uniform: f64,
    /// The same with the ranks that were divided.
    pub allocated: f64,
    /// What the weights were made of, where they come from ablations. Not in a report of others.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ablation: Option<AblationReport>,
}

/// A Linear that was solved, or some that share an A.
pub(crate) struct SolvedUnit<'a> {
    /// Number of Linears.
    pub(crate) linears: usize,
    /// Outputs of all of them.
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    /// `None` where nothing is known about its inputs.
    pub(crate) profile: Option<&'a RankProfile>,
    /// What its errors count beside the weights that are asked for.
    pub(crate) factor: f64,
}

/// Inputs that an error is measured on.
#[derive(Clone, Copy)]
enum Inputs {
    Calibration,
    /// A part of those that took no part in the calibration.
    HeldOut(usize),
}

impl RankDivision {
    /// Divides a budget of so many bits, which the uniform rank does not exceed; `None` when the recipe has none.
    ///
    /// # Errors
    /// `ERR_OPTION_INVALID`.
    pub(crate) fn new(
        recipe: &EoraRecipe,
        (uniform_rank, budget_bits): (usize, u64),
        units: &[SolvedUnit<'_>],
    ) -> Result<Option<Self>> {
        let Some(allocation) = &recipe.allocation else { return Ok(None) };
        let weight = |unit: &SolvedUnit<'_>, profile: &RankProfile| match allocation.weights {
            // Outputs of a group are as large as each other, so that its relative error is the mean over its Linears.
            RankWeights::Outputs | RankWeights::Ablation if profile.original > 0.0 => {
                unit.linears as f64 * unit.factor / profile.original
            }
            _ => unit.factor,
        };
        let candidate = |unit: &SolvedUnit<'_>| RankCandidate {
            energies: unit.profile.map_or_else(|| vec![0.0], |profile| profile.calibration.clone()),
            weight: unit.profile.map_or(0.0, |profile| weight(unit, profile)),
            shape: (unit.rows, unit.columns),
            storage: recipe.storage(),
        };
        let candidates: Vec<RankCandidate> = units.iter().map(candidate).collect();
        let budget = RankBudget::Bytes(budget_bits / 8);
        let allocated = allocate_ranks(&candidates, budget, recipe.limits(allocation))?;
        let uniform_rank = uniform_rank.max(allocation.min_rank);
        let uniform: Vec<usize> = units.iter().map(|unit| largest(unit).min(uniform_rank)).collect();
        let profiles = || units.iter().filter_map(|unit| unit.profile);
        let held_out = profiles().any(|profile| profile.hold_out.is_some());
        let error = |ranks: &[usize], inputs: Inputs| {
            let (mut left, mut total) = (0.0, 0.0);
            for (unit, &rank) in units.iter().zip(ranks) {
                let Some(profile) = unit.profile else { continue };
                let (energies, original) = match (inputs, &profile.hold_out) {
                    (Inputs::HeldOut(part), Some(held)) => (&held.energies[part], held.original[part]),
                    // An expert that no held out token reached.
                    (Inputs::HeldOut(_), None) => continue,
                    (Inputs::Calibration, _) => (&profile.calibration, profile.original),
                };
                // The weight is that of the calibration, so that both rankings speak of one aim.
                left += weight(unit, profile) * energies[rank.min(energies.len() - 1)];
                total += weight(unit, profile) * original;
            }
            if total > 0.0 { (left / total).sqrt() } else { left.sqrt() }
        };
        let (deciding, reported) = match held_out {
            true => (Inputs::HeldOut(0), Inputs::HeldOut(1)),
            false => (Inputs::Calibration, Inputs::Calibration),
        };
        let better = error(&allocated, deciding) < error(&uniform, deciding);
        let (of_uniform, of_allocated) = (error(&uniform, reported), error(&allocated, reported));
        let ranks = if better { allocated } else { uniform };
        let bits = |(unit, &rank): (&SolvedUnit<'_>, &usize)| recipe.factor_bits(unit.rows, unit.columns, rank);
        let linears: usize = units.iter().map(|unit| unit.linears).sum();
        let of_linears: usize = units.iter().zip(&ranks).map(|(unit, rank)| unit.linears * rank).sum();
        let report = AllocationReport {
            chosen: if better { "allocated" } else { "uniform" },
            uniform_rank,
            mean_rank: of_linears as f64 / linears.max(1) as f64,
            bytes: units.iter().zip(&ranks).map(bits).sum::<u64>().div_ceil(8),
            held_out,
            uniform: of_uniform,
            allocated: of_allocated,
            ablation: None,
        };
        Ok(Some(RankDivision { ranks, report }))
    }
}

fn largest(unit: &SolvedUnit<'_>) -> usize {
    unit.profile.map_or(0, RankProfile::largest_rank)
}

#[cfg(test)]
mod tests {
    use kintsugi_compensate::HoldOutProfile;

    use super::*;
    use crate::eora_recipe::AllocationRecipe;

    fn recipe() -> EoraRecipe {
        let budget = RankBudget::MeanRank(2.0);
        let allocation = AllocationRecipe { budget, min_rank: 0, multiple: 1, weights: RankWeights::Outputs };
        EoraRecipe { allocation: Some(allocation), ..EoraRecipe::uniform(4) }
    }

    fn profile(energies: [f64; 5], held: [[f64; 5]; 2]) -> RankProfile {
        let hold_out = HoldOutProfile { tokens: 9, original: [10.0; 2], energies: held.map(Vec::from) };
        RankProfile {
            original: 10.0,
            calibration: energies.to_vec(),
            best: energies.to_vec(),
            hold_out: Some(hold_out),
            dense: None,
        }
    }

    fn divide(profiles: &[RankProfile]) -> RankDivision {
        let unit = |profile| SolvedUnit { linears: 1, rows: 8, columns: 8, profile: Some(profile), factor: 1.0 };
        let units: Vec<SolvedUnit<'_>> = profiles.iter().map(unit).collect();
        RankDivision::new(&recipe(), (2, 4 * 16 * 16), &units).unwrap().unwrap()
    }

    #[test]
    fn ranks_go_where_they_remove_most_and_the_third_part_reports() {
        let (steep, flat) = ([9.0, 5.0, 2.0, 1.0, 0.5], [4.0, 3.9, 3.8, 3.7, 3.6]);
        let third = [8.0, 7.0, 6.0, 5.0, 4.0];
        let profiles = [profile(steep, [steep, third]), profile(flat, [flat, flat])];
        let found = divide(&profiles);
        assert_eq!((found.ranks, found.report.chosen, found.report.held_out), (vec![4, 0], "allocated", true));
        assert!((found.report.allocated - ((4.0 + 4.0f64) / 20.0).sqrt()).abs() < 1e-12);
        assert!((found.report.uniform - ((6.0 + 3.8f64) / 20.0).sqrt()).abs() < 1e-12);
        assert_eq!((found.report.mean_rank, found.report.bytes), (2.0, 4 * 16 * 16 / 8));
    }

    #[test]
    fn what_does_not_hold_on_other_inputs_is_not_done() {
        let (steep, flat) = ([9.0, 5.0, 2.0, 1.0, 0.5], [4.0, 3.9, 3.8, 3.7, 3.6]);
        // On other inputs it is the second one that profits.
        let profiles = [profile(steep, [flat, flat]), profile(flat, [steep, steep])];
        let found = divide(&profiles);
        assert_eq!((found.ranks, found.report.chosen), (vec![2, 2], "uniform"));
        assert!(found.report.allocated > found.report.uniform);
    }

    #[test]
    fn what_shares_an_a_gets_one_rank_and_counts_as_often_as_it_has_linears() {
        let (steep, flat) = ([9.0, 5.0, 2.0, 1.0, 0.5], [4.0, 3.9, 3.8, 3.7, 3.6]);
        let profiles = [profile(steep, [steep, steep]), profile(flat, [flat, flat])];
        let units = [(3, 16, &profiles[0]), (1, 8, &profiles[1])].map(|(linears, rows, profile)| SolvedUnit {
            linears,
            rows,
            columns: 8,
            profile: Some(profile),
            factor: 1.0,
        });
        // As many as the three of the first.
        let budget = 3 * 24 * 16;
        let found = RankDivision::new(&recipe(), (1, budget), &units).unwrap().unwrap();
        assert_eq!((found.ranks, found.report.chosen), (vec![3, 0], "allocated"));
        assert_eq!((found.report.mean_rank, found.report.bytes), (9.0 / 4.0, budget / 8));
    }

    #[test]
    fn a_group_of_alike_linears_is_worth_what_they_are_worth_apart() {
        let (own, other) = ([9.0, 5.0, 2.0, 1.0, 0.5], [9.0, 4.0, 3.9, 3.8, 3.7]);
        let (own, other) = (profile(own, [own, own]), profile(other, [other, other]));
        // Alike in every direction: errors of the group are three times those of one, its factors those of one and two Bs.
        let tripled = |energies: &[f64]| energies.iter().map(|energy| 3.0 * energy).collect::<Vec<f64>>();
        let hold_out = own.hold_out.as_ref().map(|held| HoldOutProfile {
            tokens: held.tokens,
            original: held.original.map(|original| 3.0 * original),
            energies: held.energies.each_ref().map(|energies| tripled(energies)),
        });
        let group = RankProfile {
            original: 3.0 * own.original,
            calibration: tripled(&own.calibration),
            best: tripled(&own.best),
            hold_out,
            dense: None,
        };
        let unit =
            |linears, rows, profile| SolvedUnit { linears, rows, columns: 8, profile: Some(profile), factor: 1.0 };
        let together = [unit(3, 8, &group), unit(1, 8, &other)];
        let apart = [unit(1, 8, &own), unit(1, 8, &own), unit(1, 8, &own), unit(1, 8, &other)];
        let errors = |units: &[SolvedUnit<'_>]| {
            let report = RankDivision::new(&recipe(), (1, 1 << 20), units).unwrap().unwrap().report;
            (report.uniform, report.allocated)
        };
        let (together, apart) = (errors(&together), errors(&apart));
        assert!((together.0 / apart.0 - 1.0).abs() < 1e-12 && (together.1 / apart.1 - 1.0).abs() < 1e-12);
    }

    #[test]
    fn linears_that_nothing_is_known_of_get_nothing() {
        let units = [SolvedUnit { linears: 1, rows: 8, columns: 8, profile: None, factor: 1.0 }];
        let found = RankDivision::new(&recipe(), (2, 8000), &units).unwrap().unwrap();
        assert_eq!((found.ranks, found.report.bytes), (vec![0], 0));
    }
}
