use kintsugi_compensate::{
    CompensationOptions, FactorPrecision, FactorStorage, RankBudget, RankLimits, allocate_ranks, compensation_method,
};
use kintsugi_model::DecoderSpec;
use kintsugi_runtime::{Error, ErrorCode, Result};
use serde::Serialize;

use crate::EoraInputs;
use crate::eora_unit::EoraUnit;

/// How the compensation of what compression broke is solved.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct EoraRecipe {
    /// Rank of the factors of every Linear, or of every group; the largest where a budget is divided.
    pub rank: usize,
    /// Name of a [`CompensationMethod`](kintsugi_compensate::CompensationMethod).
    pub solver: String,
    /// Bits of a value of the factors: 16, 8 or 4.
    pub factor_bits: u8,
    /// Which inputs it is solved for.
    #[serde(flatten)]
    pub inputs: EoraInputs,
    /// Whether a bias repairs what the factors leave of the mean of the inputs. Not in a report that has none.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub affine: bool,
    /// Whether Linears that read one input share an A: one compensation is solved for all of them. Not in a report where
    /// each has its own.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub grouped: bool,
    /// Ranks that differ, within a budget; `null` for one rank.
    pub allocation: Option<AllocationRecipe>,
}

/// What the factors of a Linear take at most.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct FactorShare {
    pub(crate) rank: usize,
    /// In memory; an A that several Linears share is counted with the first of them.
    pub(crate) stored_bits: u64,
    /// In a file, where every Linear has an A.
    pub(crate) file_bytes: u64,
}

/// How a budget of ranks is divided over the Linears.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct AllocationRecipe {
    /// What all factors may take together.
    pub budget: RankBudget,
    /// Least rank of a Linear.
    pub min_rank: usize,
    /// What ranks are multiples of.
    pub multiple: usize,
    /// What an error of a Linear counts.
    pub weights: RankWeights,
}

/// What the error energies of Linears are multiplied with before they are compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum RankWeights {
    /// The inverse of the energy of its outputs: relative errors count alike.
    #[default]
    Outputs,
    /// One.
    Equal,
    /// Those of the outputs, times what losing the factors of a type of Linears and of a band of blocks costs the
    /// predictions of the model.
    Ablation,
}

impl RankWeights {
    /// Their names.
    pub const NAMES: &'static [&'static str] = &["outputs", "equal", "ablation"];

    /// Those of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "outputs" => Some(RankWeights::Outputs),
            "equal" => Some(RankWeights::Equal),
            "ablation" => Some(RankWeights::Ablation),
            _ => None,
        }
    }
}

impl EoraRecipe {
    /// One rank for every Linear, solved by the default method, stored with 16 bits.
    pub fn uniform(rank: usize) -> Self {
        EoraRecipe {
            rank,
            solver: kintsugi_compensate::METHODS[0].name().to_owned(),
            factor_bits: 16,
            inputs: EoraInputs::Deployed,
            affine: false,
            grouped: false,
            allocation: None,
        }
    }

    /// Checks the options against each other.
    ///
    /// # Errors
    /// `ERR_OPTION_INVALID`, naming the option.
    pub(crate) fn validate(&self) -> Result<()> {
        if self.rank == 0 {
            return Err(Error::new(ErrorCode::OptionInvalid, "a compensation of rank 0 compensates nothing")
                .subject("eora.rank")
                .hint("Leave eora out, or give a rank such as 32 or 64"));
        }
        self.options()?;
        self.inputs.validate()?;
        if self.affine && self.inputs.is_mixed() {
            let message = "a bias is solved for the mean of one kind of inputs, and mixed inputs are two";
            return Err(Error::new(ErrorCode::OptionInvalid, message)
                .subject("eora.affine")
                .hint("Leave it out, or solve for deployed or dense inputs"));
        }
        let Some(allocation) = &self.allocation else { return Ok(()) };
        if let RankBudget::MeanRank(mean) = allocation.budget
            && !(mean.is_finite() && mean >= 1.0 && mean <= self.rank as f64)
        {
            let message = format!("a mean rank of {mean} is not between 1 and the largest rank, {}", self.rank);
            return Err(Error::new(ErrorCode::OptionInvalid, message)
                .subject("eora.meanRank")
                .hint("Use a mean below eora.rank, such as half of it"));
        }
        allocate_ranks(&[], allocation.budget, self.limits(allocation)).map(|_| ())
    }

    /// Whether the division asks what the model is without some of its factors.
    pub(crate) fn ablates(&self) -> bool {
        self.allocation.is_some_and(|allocation| allocation.weights == RankWeights::Ablation)
    }

    /// What each Linear is solved for.
    ///
    /// # Errors
    /// `ERR_OPTION_INVALID` for a method or a width that is not there.
    pub(crate) fn options(&self) -> Result<CompensationOptions> {
        Ok(CompensationOptions {
            method: compensation_method(&self.solver)?,
            rank: self.rank,
            precision: FactorPrecision::of_bits(self.factor_bits)?,
            affine: self.affine,
        })
    }

    pub(crate) fn limits(&self, allocation: &AllocationRecipe) -> RankLimits {
        RankLimits { multiple: allocation.multiple, min: allocation.min_rank, max: self.rank }
    }

    /// What one compensation each is solved for, of a block.
    pub(crate) fn units(&self, spec: &DecoderSpec) -> Vec<EoraUnit> {
        EoraUnit::of_block(spec, self.grouped)
    }

    /// What the factors of each Linear of a block take at most.
    pub(crate) fn shares(&self, spec: &DecoderSpec) -> Vec<FactorShare> {
        let mut shares = vec![FactorShare::default(); spec.linears.len()];
        for unit in self.units(spec) {
            let rank = unit.rank(self.rank);
            for &place in &unit.places {
                let linear = &spec.linears[place];
                let stored_bits = self.factor_bits(linear.rows, unit.counted_columns(place), rank);
                let file_bytes = self.file_bytes(linear.rows, linear.columns, rank);
                shares[place] = FactorShare { rank, stored_bits, file_bytes };
            }
        }
        shares
    }

    /// Bits of the factors of a Linear, and of their bias.
    pub(crate) fn factor_bits(&self, rows: usize, columns: usize, rank: usize) -> u64 {
        self.storage().stored_bits(rows, columns, rank)
    }

    /// Bytes that they take in a file, where every Linear has an A: values of 16 bits, whatever the codes, biases and
    /// centres in f32.
    fn file_bytes(&self, rows: usize, columns: usize, rank: usize) -> u64 {
        let affine = if self.affine && rank > 0 { 4 * (rows + rank) } else { 0 };
        (rank * (rows + columns) * 2 + affine) as u64
    }

    /// What the factors are stored in; bf16 for a width that [`EoraRecipe::validate`] refuses.
    pub(crate) fn storage(&self) -> FactorStorage {
        let precision = FactorPrecision::of_bits(self.factor_bits).unwrap_or_default();
        FactorStorage { precision, affine: self.affine }
    }

    /// The bits that all factors of a model may take; `None` without a budget.
    pub(crate) fn budget_bits(&self, spec: &DecoderSpec) -> Option<u64> {
        let allocation = self.allocation.as_ref()?;
        Some(match allocation.budget {
            RankBudget::Bytes(bytes) => bytes.saturating_mul(8),
            RankBudget::MeanRank(mean) => {
                let (below, above) = (self.model_bits(spec, mean as usize), self.model_bits(spec, mean as usize + 1));
                below + (mean.fract() * (above - below) as f64) as u64
            }
        })
    }

    /// Bits of one rank in every Linear of a model.
    fn model_bits(&self, spec: &DecoderSpec, rank: usize) -> u64 {
        let of_unit = |unit: &EoraUnit| self.factor_bits(unit.rows, unit.columns, unit.rank(rank));
        self.units(spec).iter().map(of_unit).sum::<u64>() * spec.layers as u64
    }

    /// Refuses a budget that the least ranks exceed, or that no Linear gets anything of.
    ///
    /// # Errors
    /// `ERR_OPTION_INVALID`.
    pub(crate) fn check_budget(&self, spec: &DecoderSpec) -> Result<()> {
        let (Some(allocation), Some(budget)) = (&self.allocation, self.budget_bits(spec)) else { return Ok(()) };
        let least = self.model_bits(spec, allocation.min_rank);
        if least > budget {
            let message = format!(
                "rank {} in every Linear takes {} bytes, the budget is {}",
                allocation.min_rank,
                least.div_ceil(8),
                budget / 8
            );
            return Err(Error::new(ErrorCode::OptionInvalid, message)
                .subject("eora.minRank")
                .hint("Use a smaller least rank or a larger budget"));
        }
        let step =
            |unit: &EoraUnit| self.factor_bits(unit.rows, unit.columns, unit.rank(allocation.multiple.min(self.rank)));
        let cheapest = self.units(spec).iter().map(step).min().unwrap_or(0);
        if cheapest > budget {
            let message = format!("the budget is {} bytes, the smallest factors take {}", budget / 8, cheapest / 8);
            return Err(Error::new(ErrorCode::OptionInvalid, message)
                .subject(match allocation.budget {
                    RankBudget::Bytes(_) => "eora.budgetBytes",
                    RankBudget::MeanRank(_) => "eora.meanRank",
                })
                .hint("Use a larger budget, or smaller steps of rank"));
        }
        Ok(())
    }

    /// The one rank for all Linears of a model that takes no more than the budget: what a block is deployed with before
    /// the division is known, and what the division is compared with.
    pub(crate) fn uniform_rank(&self, spec: &DecoderSpec) -> usize {
        let Some(budget) = self.budget_bits(spec) else { return self.rank };
        (1..=self.rank).take_while(|&rank| self.model_bits(spec, rank) <= budget).last().unwrap_or(0)
    }
}
