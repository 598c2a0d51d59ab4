use std::fs;
use std::path::Path;

use kintsugi_checkpoint::{read_adapter, write_adapter};
use kintsugi_compensate::RankProfile;
use kintsugi_model::DecoderSpec;
use kintsugi_runtime::{Error, ErrorCode, Result};
use kintsugi_weights::{Adapter, AdapterEntry, LowRank};

use crate::eora_unit::EoraUnit;
use crate::ledger_unit::LedgerUnit;
use crate::rank_division::{RankDivision, SolvedUnit};
use crate::{AllocationReport, EoraRecipe, LinearReport, Recipe};

/// The factors of all blocks that a job has solved, and what becomes of them: they wait in files of their own, of the
/// largest rank, until the ranks of a budget can be divided.
pub(crate) struct SolvedFactors {
    /// What was done to each Linear, with the ranks that it gets.
    pub(crate) linears: Vec<LinearReport>,
    /// How the ranks were divided; `None` for one rank.
    pub(crate) allocation: Option<AllocationReport>,
    /// Bits of all of them in memory.
    pub(crate) bits: u64,
}

impl SolvedFactors {
    /// What is in the names of files that hold the factors of a block.
    pub(crate) const PREFIX: &'static str = "factors-";

    /// Where the factors of a block are left.
    pub(crate) fn name_of(block: usize) -> String {
        format!("{}{block:05}", Self::PREFIX)
    }

    /// Leaves the factors of a block in `folder` for the end of the job; gives their name there, `None` without any.
    ///
    /// # Errors
    /// `ERR_OUTPUT_UNWRITABLE`.
    pub(crate) fn save(
        folder: &Path,
        spec: &DecoderSpec,
        block: usize,
        factors: &[Option<LowRank>],
    ) -> Result<Option<String>> {
        let mut adapter = Adapter::default();
        for (linear, factors) in spec.linears.iter().zip(factors) {
            if let Some(factors) = factors {
                let entry = AdapterEntry { factors: factors.clone(), scaling: 1.0 };
                adapter.linears.insert(spec.linear_name(block, linear), entry);
            }
        }
        if adapter.linears.is_empty() {
            return Ok(None);
        }
        let name = Self::name_of(block);
        let path = folder.join(&name);
        // An earlier run may have been interrupted between this folder and its record.
        if path.exists() {
            fs::remove_dir_all(&path).map_err(|error| Error::unwritable(&path, &error))?;
        }
        write_adapter(&path, &adapter, "partial")?;
        Ok(Some(name))
    }

    /// Divides the ranks over the Linears of all units.
    ///
    /// # Errors
    /// `ERR_OPTION_INVALID`.
    pub(crate) fn divide(recipe: &Recipe, spec: &DecoderSpec, units: &[LedgerUnit]) -> Result<Self> {
        let mut linears: Vec<LinearReport> = units.iter().flat_map(|unit| unit.linears.clone()).collect();
        let Some(eora) = &recipe.eora else { return Ok(SolvedFactors { linears, allocation: None, bits: 0 }) };
        let of_block = eora.units(spec);
        let allocation = match eora.budget_bits(spec) {
            Some(budget) => divide(eora, budget, spec, &of_block, &mut linears, units)?,
            None => None,
        };
        let bits = linears.chunks(spec.linears.len().max(1)).flat_map(|block| {
            of_block.iter().map(|unit| {
                let rank = block.get(unit.places[0]).map_or(0, |linear| linear.rank);
                eora.factor_bits(unit.rows, unit.columns, rank)
            })
        });
        Ok(SolvedFactors { bits: bits.sum(), linears, allocation })
    }

    /// The factors that each Linear gets, from the files of all units.
    ///
    /// # Errors
    /// What reading the files reports.
    pub(crate) fn read(&self, folder: &Path, units: &[LedgerUnit]) -> Result<Adapter> {
        let mut all = Adapter::default();
        if self.linears.iter().all(|linear| linear.rank == 0) {
            // The files may be gone already.
            return Ok(all);
        }
        for name in units.iter().filter_map(|unit| unit.factors.as_ref()) {
            all.linears.extend(read_adapter(&folder.join(name))?.linears);
        }
        if self.allocation.is_some() {
            for linear in &self.linears {
                match all.linears.get_mut(&linear.name) {
                    Some(entry) if linear.rank > 0 => entry.factors = entry.factors.prefix(linear.rank),
                    Some(_) => drop(all.linears.remove(&linear.name)),
                    None => {}
                }
            }
        }
        Ok(all)
    }
}

/// Divides a budget of so many bits over all blocks; the reports then tell of the ranks that Linears get.
fn divide(
    eora: &EoraRecipe,
    budget: u64,
    spec: &DecoderSpec,
    of_block: &[EoraUnit],
    linears: &mut [LinearReport],
    units: &[LedgerUnit],
) -> Result<Option<AllocationReport>> {
    let profiles: Vec<Option<&RankProfile>> =
        units.iter().flat_map(|unit| unit.profiles.iter().map(Option::as_ref)).collect();
    if profiles.len() != linears.len() {
        let message = format!("{} Linears have {} profiles of their ranks", linears.len(), profiles.len());
        return Err(Error::new(ErrorCode::Internal, message).subject("ledger"));
    }
    let costs = units.iter().find_map(|unit| unit.ablation.as_ref());
    let weights = costs.map(|costs| costs.weights(spec, of_block, &profiles)).transpose()?;
    let width = spec.linears.len().max(1);
    let blocks = || (0..linears.len() / width).map(|block| block * width);
    let all: Vec<(usize, &EoraUnit)> =
        blocks().flat_map(|first| of_block.iter().map(move |unit| (first, unit))).collect();
    let solved: Vec<SolvedUnit<'_>> = all
        .iter()
        .map(|&(first, EoraUnit { places, rows, columns })| {
            let at = first + places[0];
            let factor = weights.as_ref().map_or(1.0, |weights| weights.factors[at]);
            SolvedUnit { linears: places.len(), rows: *rows, columns: *columns, profile: profiles[at], factor }
        })
        .collect();
    let uniform_rank = eora.uniform_rank(spec);
    let Some(mut division) = RankDivision::new(eora, (uniform_rank, budget), &solved)? else { return Ok(None) };
    division.report.ablation = weights.map(|weights| weights.report);
    for ((&(first, unit), solved), rank) in all.iter().zip(&solved).zip(division.ranks) {
        let Some(profile) = solved.profile else { continue };
        for &place in &unit.places {
            let linear = &mut linears[first + place];
            let bits = |rank| eora.factor_bits(linear.rows, unit.counted_columns(place), rank);
            linear.stored_bits = linear.stored_bits + bits(rank) - bits(linear.rank);
            linear.rank = rank;
            if rank == 0 {
                linear.shared_with.clear();
            }
            linear.error = Some(profile.error(rank));
            linear.hold_out = profile.hold_out_error(rank);
            linear.dense_error = profile.dense_error(rank);
        }
    }
    Ok(Some(division.report))
}
