use std::collections::BTreeMap;
use std::path::PathBuf;

use kintsugi_merge::{MOST_RANK, MergeOptions};
use kintsugi_runtime::{Error, ErrorCode, Result};
use kintsugi_weights::ElementType;
use serde::{Deserialize, Serialize};

/// Ranks that vLLM can be started for (`max_lora_rank` of its `LoRAConfig`).
pub const VLLM_RANKS: &[usize] = &[1, 8, 16, 32, 64, 128, 256, 320, 512];

/// The rank of the modules in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RankPadding {
    /// That of the module that has most, so that readers without rank patterns are right.
    Uniform,
    /// The smallest that vLLM knows, for all modules.
    Vllm,
    /// Each module its own.
    None,
}

impl RankPadding {
    /// Every choice, as users write it.
    pub const NAMES: &'static [&'static str] = &["uniform", "vllm", "none"];

    /// The choice of that name.
    ///
    /// # Errors
    /// `ERR_OPTION_INVALID`.
    pub fn from_name(name: &str) -> Result<Self> {
        match name {
            "uniform" => Ok(RankPadding::Uniform),
            "vllm" => Ok(RankPadding::Vllm),
            "none" => Ok(RankPadding::None),
            other => Err(no_choice("padding", other, Self::NAMES)),
        }
    }

    /// The common rank for modules of at most this rank; `None` where each has its own.
    ///
    /// # Errors
    /// `ERR_OPTION_INVALID` for more than vLLM serves.
    pub(crate) fn common_rank(self, largest: usize) -> Result<Option<usize>> {
        match self {
            RankPadding::None => Ok(None),
            RankPadding::Uniform => Ok(Some(largest)),
            RankPadding::Vllm => match VLLM_RANKS.iter().find(|&&known| known >= largest) {
                Some(&rank) => Ok(Some(rank)),
                None => Err(Error::new(ErrorCode::OptionInvalid, format!("rank {largest} is more than vLLM serves"))
                    .subject("padding")
                    .hint(format!(
                        "Merge at a rank of at most {}, or give a total rank",
                        VLLM_RANKS[VLLM_RANKS.len() - 1]
                    ))),
            },
        }
    }
}

/// What becomes of modules that adapters hold whole (`modules_to_save` of peft): there is no update to add up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WholeModuleRule {
    /// Carried over from the one adapter that has it, or where all that have it agree in every byte; else refused.
    #[default]
    Equal,
    /// `Σ w W / Σ w` over the adapters that have it.
    Mean,
    /// Refused.
    Refuse,
}

impl WholeModuleRule {
    /// Every choice, as users write it.
    pub const NAMES: &'static [&'static str] = &["equal", "mean", "refuse"];

    /// The choice of that name.
    ///
    /// # Errors
    /// `ERR_OPTION_INVALID`.
    pub fn from_name(name: &str) -> Result<Self> {
        match name {
            "equal" => Ok(WholeModuleRule::Equal),
            "mean" => Ok(WholeModuleRule::Mean),
            "refuse" => Ok(WholeModuleRule::Refuse),
            other => Err(no_choice("modulesToSave", other, Self::NAMES)),
        }
    }
}

fn no_choice(option: &str, value: &str, names: &[&str]) -> Error {
    Error::new(ErrorCode::OptionInvalid, format!("{option} has no choice \"{value}\""))
        .subject(option)
        .hint(format!("The choices are {}", names.join(", ")))
}

/// What the user asked for.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MergeRecipe {
    /// PEFT folders.
    pub adapters: Vec<PathBuf>,
    /// What the update of each is multiplied with.
    pub weights: Vec<f64>,
    /// Folder that is written.
    pub out: PathBuf,
    /// Name of a merge method.
    pub method: String,
    /// What the method is told; `factor_type` beside it decides about the type.
    pub options: MergeOptions,
    /// Type of the factors; `null` for that of the adapters, f32 where they differ.
    pub factor_type: Option<ElementType>,
    /// The rank of the modules in the file.
    pub padding: RankPadding,
    /// Merge adapters whose configs name different base models.
    pub allow_different_bases: bool,
    /// Saved statistics of the base model, in whose metric errors count.
    #[serde(default)]
    pub calibration: Option<PathBuf>,
    /// The compensation of a compressed base (`eora/`), which the result holds beside the merged adapters.
    #[serde(default)]
    pub compensation: Option<PathBuf>,
    /// With a compensation: the rank of both together; `null` puts the compensation beside and adds the ranks.
    #[serde(default)]
    pub total_rank: Option<usize>,
    /// What becomes of modules that adapters hold whole.
    #[serde(default)]
    pub modules_to_save: WholeModuleRule,
    /// What adapters must be for the merge to go on: the fingerprints that an earlier merge has recorded.
    #[serde(skip)]
    pub expected: BTreeMap<PathBuf, String>,
}

impl MergeRecipe {
    /// Checks what can be checked without looking into files.
    ///
    /// # Errors
    /// `ERR_OPTION_INVALID` with the name of the option.
    pub(crate) fn validate(&self) -> Result<()> {
        let invalid = |message: String, subject: &str, hint: &str| {
            Err(Error::new(ErrorCode::OptionInvalid, message).subject(subject).hint(hint))
        };
        self.options.validate()?;
        if self.adapters.is_empty() {
            return invalid("there is nothing to merge".into(), "adapters", "Give at least one adapter folder");
        }
        if self.weights.len() != self.adapters.len() {
            let message = format!("{} weights for {} adapters", self.weights.len(), self.adapters.len());
            return invalid(message, "weights", "Give one weight for each adapter");
        }
        if let Some(weight) = self.weights.iter().find(|weight| !weight.is_finite()) {
            return invalid(format!("a weight is {weight}"), "weights", "Give finite numbers");
        }
        match (self.total_rank, &self.compensation) {
            (Some(_), None) => {
                invalid("there is no compensation to join".into(), "totalRank", "Give rank, or a compensation")
            }
            (Some(0), _) => invalid("the total rank is 0".into(), "totalRank", "Give a rank of at least 1"),
            (Some(rank), _) if rank > MOST_RANK => {
                invalid(format!("the total rank is {rank}, above {MOST_RANK}"), "totalRank", "Give a smaller rank")
            }
            _ => Ok(()),
        }
    }
}
