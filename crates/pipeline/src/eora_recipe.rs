use kintsugi_compensate::{
    CompensationOptions, FactorPrecision, RankBudget, RankLimits, allocate_ranks, compensation_method,
};
use kintsugi_model::{DecoderSpec, LinearSpec};
use kintsugi_runtime::{Error, ErrorCode, Result};
use serde::Serialize;

/// How the compensation of what compression broke is solved.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct EoraRecipe {
    /// Rank of the factors of every Linear; the largest where a budget is divided.
    pub rank: usize,
    /// Name of a [`CompensationMethod`](kintsugi_compensate::CompensationMethod).
    pub solver: String,
    /// Bits of a value of the factors: 16, 8 or 4.
    pub factor_bits: u8,
    /// Ranks that differ, within a budget; `null` for one rank.
    pub allocation: Option<AllocationRecipe>,
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
}

impl RankWeights {
    /// Their names.
    pub const NAMES: &'static [&'static str] = &["outputs", "equal"];

    /// Those of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "outputs" => Some(RankWeights::Outputs),
            "equal" => Some(RankWeights::Equal),
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
        let Some(allocation) = &self.allocation else { return Ok(()) };
        if let RankBudget::MeanRank(mean) = allocation.budget
            && !(mean.is_finite() && mean > 0.0 && mean <= self.rank as f64)
        {
            let message = format!("a mean rank of {mean} is not between 0 and the largest rank, {}", self.rank);
            return Err(Error::new(ErrorCode::OptionInvalid, message)
                .subject("eora.meanRank")
                .hint("Use a mean below eora.rank, such as half of it"));
        }
        allocate_ranks(&[], allocation.budget, self.limits(allocation)).map(|_| ())
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
        })
    }

    pub(crate) fn limits(&self, allocation: &AllocationRecipe) -> RankLimits {
        RankLimits { multiple: allocation.multiple, min: allocation.min_rank, max: self.rank }
    }

    /// Bits of the factors of a Linear.
    pub(crate) fn factor_bits(&self, rows: usize, columns: usize, rank: usize) -> u64 {
        self.precision().stored_bits(rows, columns, rank)
    }

    /// What the factors are stored in; bf16 for a width that [`EoraRecipe::validate`] refuses.
    pub(crate) fn precision(&self) -> FactorPrecision {
        FactorPrecision::of_bits(self.factor_bits).unwrap_or_default()
    }

    /// The one rank for all Linears of a model that takes no more than the budget: what a block is deployed with before
    /// the division is known, and what the division is compared with.
    pub(crate) fn uniform_rank(&self, spec: &DecoderSpec) -> usize {
        let Some(allocation) = &self.allocation else { return self.rank };
        let rank = match allocation.budget {
            RankBudget::MeanRank(mean) => mean.floor() as usize,
            RankBudget::Bytes(bytes) => {
                let of_linear = |linear: &LinearSpec, rank: usize| {
                    let rank = rank.min(linear.rows).min(linear.columns);
                    u128::from(self.factor_bits(linear.rows, linear.columns, rank))
                };
                let fits = |rank: usize| {
                    let of_block: u128 = spec.linears.iter().map(|linear| of_linear(linear, rank)).sum();
                    of_block * spec.layers as u128 <= u128::from(bytes) * 8
                };
                (1..=self.rank).take_while(|&rank| fits(rank)).last().unwrap_or(0)
            }
        };
        let rank = rank.min(self.rank);
        if rank >= allocation.multiple { rank / allocation.multiple * allocation.multiple } else { rank }
    }
}
