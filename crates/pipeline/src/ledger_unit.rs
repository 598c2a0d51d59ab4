use kintsugi_checkpoint::{RecordedUnit, UnitRecord};
use kintsugi_compensate::RankProfile;
use kintsugi_model::{DecoderSpec, LinearSpec};
use kintsugi_runtime::{Error, ErrorCode, Result};
use serde::{Deserialize, Serialize};

use crate::rank_ablation::AblationCosts;
use crate::{LinearReport, PhaseSeconds};

/// A finished unit: the tensors outside of the blocks, a block, or the ablations behind the last one.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct LedgerUnit {
    /// What its part file holds.
    pub(crate) part: Option<UnitRecord>,
    /// What was done to each of its Linears.
    pub(crate) linears: Vec<LinearReport>,
    /// What each rank of their factors leaves, where a budget of ranks is to be divided; else empty.
    #[serde(default)]
    pub(crate) profiles: Vec<Option<RankProfile>>,
    /// The file with the input of the next block; `None` without calibration.
    pub(crate) activations: Option<String>,
    /// The same of the dense model, where both run.
    #[serde(default)]
    pub(crate) dense_activations: Option<String>,
    /// The folder with its factors; `None` without.
    pub(crate) factors: Option<String>,
    /// What groups of factors are worth: of the unit behind the last block, where ranks are divided by it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) ablation: Option<AblationCosts>,
    /// Seconds of the job so far, earlier runs included.
    pub(crate) seconds: f64,
    /// The same by phase.
    pub(crate) phases: PhaseSeconds,
}

impl LedgerUnit {
    /// Refuses units that do not stand as a job records them: `before` of them outside of the blocks, then a block each
    /// with its Linears, and behind the last block ablations or nothing.
    ///
    /// # Errors
    /// `ERR_RESUME_MISMATCH`.
    pub(crate) fn check_order(units: &[LedgerUnit], before: usize, spec: &DecoderSpec) -> Result<()> {
        let is_in_place = |(at, unit): (usize, &LedgerUnit)| {
            let block = at.checked_sub(before).filter(|&block| block < spec.layers);
            let of_block = block.map_or(&[][..], |_| &spec.linears);
            let named = |(linear, report): (&LinearSpec, &LinearReport)| {
                block.is_some_and(|block| spec.linear_name(block, linear) == report.name)
            };
            let is_last = at == before + spec.layers;
            of_block.len() == unit.linears.len()
                && of_block.iter().zip(&unit.linears).all(named)
                && unit.ablation.is_some() == is_last
                && at <= before + spec.layers
        };
        let Some(wrong) = units.iter().enumerate().position(|place| !is_in_place(place)) else { return Ok(()) };
        let expected = match wrong.checked_sub(before) {
            None => "what is outside of the blocks".to_owned(),
            Some(block) if block < spec.layers => format!("the Linears of {}", spec.block_name(block)),
            Some(block) if block == spec.layers => "costs of ablations".to_owned(),
            Some(_) => "nothing".to_owned(),
        };
        let message = format!(
            "unit {} of the ledger has {}, where this release records {expected}",
            wrong + 1,
            units[wrong].content()
        );
        Err(Error::new(ErrorCode::ResumeMismatch, message)
            .subject("ledger")
            .hint("Discard what the interrupted job left with fresh (--fresh)"))
    }

    /// What it is of, in words.
    fn content(&self) -> String {
        let linears = match &self.linears[..] {
            [] => "no Linears".to_owned(),
            [only] => format!("the Linear {}", only.name),
            [first, .., last] => format!("the {} Linears {} to {}", self.linears.len(), first.name, last.name),
        };
        let costs = if self.ablation.is_some() { " and costs of ablations" } else { "" };
        linears + costs
    }
}

impl RecordedUnit for LedgerUnit {
    fn file_names(&self) -> Vec<&str> {
        self.activations.iter().chain(&self.dense_activations).chain(&self.factors).map(String::as_str).collect()
    }

    fn is_sound(&self) -> bool {
        let sound = self.ablation.as_ref().is_none_or(AblationCosts::is_sound);
        sound && self.profiles.iter().flatten().all(RankProfile::is_sound)
    }
}

#[cfg(test)]
mod tests {
    use kintsugi_compensate::HoldOutProfile;

    use super::*;

    #[test]
    fn every_file_of_a_unit_is_named() {
        let [activations, dense_activations, factors] = ["a", "d", "f"].map(|name| Some(name.into()));
        let unit = LedgerUnit { activations, dense_activations, factors, ..LedgerUnit::default() };
        assert_eq!(unit.file_names(), ["a", "d", "f"]);
        assert!(LedgerUnit::default().file_names().is_empty());
    }

    #[test]
    fn a_profile_of_no_rank_is_not_sound() {
        let profile = RankProfile { calibration: vec![1.0], best: vec![1.0], ..RankProfile::default() };
        let empty = RankProfile { hold_out: Some(HoldOutProfile::default()), ..profile.clone() };
        for (profile, sound) in [(profile, true), (empty, false), (RankProfile::default(), false)] {
            let unit = LedgerUnit { profiles: vec![None, Some(profile)], ..LedgerUnit::default() };
            assert_eq!(unit.is_sound(), sound);
        }
    }
}
