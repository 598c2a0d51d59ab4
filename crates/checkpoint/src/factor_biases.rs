use std::collections::BTreeMap;
use std::path::Path;

use kintsugi_runtime::{Error, Result};
use kintsugi_weights::FactorBias;

use crate::adapter_folder::{PREFIX, as_adapter_error};
use crate::factor_centres::FactorCentres;
use crate::peft_adapter::invalid;
use crate::tensor_set::TensorSet;

/// The key of a bias behind the module path.
pub(crate) const BIAS: &str = "lora_B.bias";

/// The biases beside B in a PEFT folder whose config says `lora_bias`, and where there are any the centres that they
/// can be divided by. PEFT gives every module one.
#[derive(Debug)]
pub(crate) struct FactorBiases {
    /// Tensors by module.
    keys: BTreeMap<String, String>,
    centres: Option<FactorCentres>,
}

impl FactorBiases {
    /// Checks the tensors `keys`, by module, against `modules`: name and outputs of each.
    ///
    /// # Errors
    /// `ERR_ADAPTER_INVALID` when a module has none, a bias has no module or another shape, or the centres are damaged.
    pub(crate) fn open<'a>(
        folder: &Path,
        keys: BTreeMap<String, (String, Vec<usize>)>,
        modules: impl Iterator<Item = (&'a str, usize)>,
    ) -> Result<Self> {
        let mut found = BTreeMap::new();
        let mut left = keys;
        for (module, out_features) in modules {
            let Some((key, shape)) = left.remove(module) else {
                return Err(invalid("'lora_bias' is set, and the module has no bias beside B", module)
                    .hint("Save the adapter again with PEFT"));
            };
            if shape != [out_features] {
                return Err(invalid(format!("the bias is {shape:?}, B has {out_features} outputs"), key)
                    .hint("Config and weights may belong to different adapters"));
            }
            found.insert(module.to_owned(), key);
        }
        if let Some((key, _)) = left.into_values().next() {
            return Err(invalid("the bias belongs to no factors", key).hint("Save the adapter again with PEFT"));
        }
        Ok(FactorBiases { keys: found, centres: FactorCentres::open(folder)? })
    }

    /// The bias of a module of that rank.
    ///
    /// # Errors
    /// `ERR_ADAPTER_INVALID` when it is damaged, NaN or infinite, or its centre is.
    pub(crate) fn of(&self, weights: &TensorSet, module: &str, rank: usize) -> Result<Option<FactorBias>> {
        let Some(key) = self.keys.get(module) else { return Ok(None) };
        let values = weights.vector(key).map_err(as_adapter_error)?;
        let centre = self.centres.as_ref().map(|centres| centres.of(module, rank)).transpose()?;
        Ok(Some(FactorBias { values, centre }))
    }
}

/// The module of a bias beside B, with or without the name of the adapter: `PATH.lora_B.bias`, `PATH.lora_B.NAME.bias`.
pub(crate) fn bias_module(key: &str) -> Option<&str> {
    let path = key.strip_prefix(PREFIX)?.strip_suffix(".bias")?;
    let plain = path.strip_suffix(".lora_B");
    let module = plain.or_else(|| path.rsplit_once('.')?.0.strip_suffix(".lora_B"))?;
    (!module.is_empty()).then_some(module)
}

/// Where only updates without a bias can be used.
pub(crate) fn refused(path: &Path) -> Error {
    invalid("'lora_bias' is set: an adapter with biases beside B is no update of weights alone", path.display())
        .hint("An affine compensation can only be loaded (option compensation); merge other adapters into their base with PEFT")
}

/// Where biases lie in a torch archive.
pub(crate) fn unreadable(path: &Path) -> Error {
    invalid("'lora_bias' is set, and biases beside B are read from safetensors alone", path.display())
        .hint("Save the adapter as adapter_model.safetensors (PEFT: safe_serialization=True)")
}
