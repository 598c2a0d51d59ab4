use std::fs;
use std::path::Path;

use kintsugi_checkpoint::{read_adapter, write_adapter};
use kintsugi_compensate::RankProfile;
use kintsugi_model::DecoderSpec;
use kintsugi_runtime::{Error, ErrorCode, Result};
use kintsugi_weights::{Adapter, AdapterEntry, LowRank};

use crate::ledger_unit::LedgerUnit;
use crate::rank_division::{RankDivision, SolvedLinear};
use crate::{AllocationReport, LinearReport, Recipe};

/// The factors of all blocks that a job has solved, and what becomes of them: they wait in files of their own, of the
/// largest rank, until the ranks of a budget can be divided.
pub(crate) struct SolvedFactors {
    /// What was done to each Linear, with the ranks that it gets.
    pub(crate) linears: Vec<LinearReport>,
    /// How the ranks were divided; `None` for one rank.
    pub(crate) allocation: Option<AllocationReport>,
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
        let profiles: Vec<Option<&RankProfile>> =
            units.iter().flat_map(|unit| unit.profiles.iter().map(Option::as_ref)).collect();
        let budgeted = recipe.eora.as_ref().and_then(|eora| Some((eora, eora.budget_bits(spec)?)));
        let Some((eora, budget)) = budgeted else { return Ok(SolvedFactors { linears, allocation: None }) };
        if profiles.len() != linears.len() {
            let message = format!("{} Linears have {} profiles of their ranks", linears.len(), profiles.len());
            return Err(Error::new(ErrorCode::Internal, message).subject("ledger"));
        }
        let costs = units.iter().find_map(|unit| unit.ablation.as_ref());
        let weights = costs.map(|costs| costs.weights(spec, &profiles)).transpose()?;
        let factor = |at: usize| weights.as_ref().map_or(1.0, |weights| weights.factors[at]);
        let pairs = linears.iter().zip(&profiles).enumerate();
        let solved: Vec<SolvedLinear<'_>> = pairs
            .map(|(at, (linear, &profile))| SolvedLinear {
                rows: linear.rows,
                columns: linear.columns,
                profile,
                factor: factor(at),
            })
            .collect();
        let Some(mut division) = RankDivision::new(eora, (eora.uniform_rank(spec), budget), &solved)? else {
            return Ok(SolvedFactors { linears, allocation: None });
        };
        division.report.ablation = weights.map(|weights| weights.report);
        let RankDivision { ranks, report } = division;
        for ((linear, profile), rank) in linears.iter_mut().zip(&profiles).zip(ranks) {
            let Some(profile) = profile else { continue };
            let bits = |rank| eora.factor_bits(linear.rows, linear.columns, rank);
            linear.stored_bits = linear.stored_bits + bits(rank) - bits(linear.rank);
            linear.rank = rank;
            linear.error = Some(profile.error(rank));
            linear.hold_out = profile.hold_out_error(rank);
            linear.dense_error = profile.dense_error(rank);
        }
        Ok(SolvedFactors { linears, allocation: Some(report) })
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
