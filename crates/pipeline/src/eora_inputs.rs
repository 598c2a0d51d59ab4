use kintsugi_runtime::Result;
use serde::Serialize;

/// Which inputs a compensation is solved for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
#[serde(tag = "inputs", rename_all = "lowercase")]
pub enum EoraInputs {
    /// What Linears read where they are deployed: behind blocks that are compressed and compensated.
    #[default]
    Deployed,
    /// What they read in the original model. Nothing that is compressed runs, and a compression is solved for the same
    /// inputs.
    Dense,
    /// Deployed inputs, with the outputs of the original model on its own inputs as the target.
    Mixed {
        /// α: how much of the difference of both inputs is corrected.
        mismatch: f64,
    },
}

impl EoraInputs {
    /// Their names.
    pub const NAMES: &'static [&'static str] = &["deployed", "dense", "mixed"];
    /// How much is corrected unless the recipe says otherwise.
    pub const MISMATCH: f64 = 0.5;

    /// Those of that name; `mismatch` is for `mixed`.
    pub fn from_name(name: &str, mismatch: Option<f64>) -> Option<Self> {
        match name {
            "deployed" => Some(EoraInputs::Deployed),
            "dense" => Some(EoraInputs::Dense),
            "mixed" => Some(EoraInputs::Mixed { mismatch: mismatch.unwrap_or(Self::MISMATCH) }),
            _ => None,
        }
    }

    /// Checks the share of the mismatch.
    ///
    /// # Errors
    /// `ERR_OPTION_INVALID`.
    pub(crate) fn validate(self) -> Result<()> {
        match self {
            EoraInputs::Mixed { mismatch } => kintsugi_compensate::check_share(mismatch),
            _ => Ok(()),
        }
    }

    /// Whether the activations of the original model are carried along beside those of the deployed one.
    pub(crate) fn is_mixed(self) -> bool {
        matches!(self, EoraInputs::Mixed { .. })
    }

    /// How a file of statistics calls the activations of a job: those that its statistics are of.
    pub(crate) fn stream_name(self) -> &'static str {
        match self {
            EoraInputs::Dense => "dense",
            EoraInputs::Deployed | EoraInputs::Mixed { .. } => "deployed",
        }
    }
}
