use std::collections::BTreeMap;
use std::path::Path;

use kintsugi_runtime::{Error, ErrorCode, Result, StagedFolder};
use kintsugi_weights::{Adapter, AdapterEntry, ElementType};

use crate::adapter_folder::{PREFIX, WEIGHTS};
use crate::factor_biases::BIAS;
use crate::factor_centres::FactorCentres;
use crate::factor_scales::FactorScales;
use crate::peft_config::PeftConfig;
use crate::safetensors_writer::{SafetensorsWriter, TensorHeader, file_order, float_bytes, float_dtype, write_synced};
use crate::{AdapterFolder, ModuleKind};

/// Reads the whole of a PEFT folder, see [`AdapterFolder`]; biases beside B too.
///
/// # Errors
/// `ERR_ADAPTER_INVALID` for everything that is missing, damaged, not finite or not a plain LoRA of Linears.
pub fn read_adapter(folder: &Path) -> Result<Adapter> {
    let folder = AdapterFolder::open_with_biases(folder)?;
    let mut linears = BTreeMap::new();
    for module in folder.modules() {
        if module.kind != ModuleKind::Linear {
            return Err(invalid(
                "the module is an embedding, only Linears can be adapted while a model runs",
                &module.name,
            )
            .hint("Merge the adapter into the base model"));
        }
        let factors = folder.factors(&module.name)?;
        linears.insert(module.name.clone(), AdapterEntry { factors, scaling: module.scaling as f32 });
    }
    Ok(Adapter { linears, base_model: folder.base_model().map(str::to_string) })
}

/// Writes a PEFT folder that appears whole or not at all.
///
/// Factors are stored in their own type, unscaled; the scaling is expressed by the alpha of each module, so that PEFT
/// computes it exactly and reading gives the same adapter. `r` is the largest rank, every rank stands in
/// `rank_pattern` and every alpha in `alpha_pattern` under the full module path, and at scaling 1 both maps are
/// identical. `base_model` becomes `base_model_name_or_path`. Factors of codes are written as the floats that they stand
/// for, with their scales in a file beside them; biases in f32, with their centres in another.
///
/// # Errors
/// `ERR_ADAPTER_INVALID` when there are no factors or a name cannot be written, `ERR_OUTPUT_NOT_EMPTY`,
/// `ERR_OUTPUT_UNWRITABLE`.
pub fn write_adapter(folder: &Path, adapter: &Adapter, base_model: &str) -> Result<()> {
    check_writable(adapter)?;
    let staged = StagedFolder::create(folder)?;
    write_checked(staged.path(), adapter, base_model)?;
    staged.commit()
}

/// Writes the files of a PEFT folder into a folder that its caller will name when it is whole, see [`write_adapter`].
///
/// # Errors
/// As [`write_adapter`].
pub fn write_adapter_files(folder: &Path, adapter: &Adapter, base_model: &str) -> Result<()> {
    check_writable(adapter)?;
    write_checked(folder, adapter, base_model)
}

/// Names are used as regular expressions by PEFT, a rank of zero is refused by it, and of biases it knows all or none.
fn check_writable(adapter: &Adapter) -> Result<()> {
    if adapter.linears.is_empty() {
        return Err(invalid("there are no factors to write", "adapter").hint("Use a rank of at least 1"));
    }
    let biased = adapter.linears.values().any(|entry| entry.factors.bias().is_some());
    for (name, entry) in &adapter.linears {
        if biased && entry.factors.bias().is_none() {
            return Err(invalid("the factors have no bias, and others of the adapter have one", name)
                .hint("Write them into folders of their own"));
        }
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if name.is_empty() || !name.chars().all(plain) {
            return Err(invalid("the module name has characters that PEFT would take for a pattern", name)
                .hint("Use letters, digits, dots, underscores and hyphens"));
        }
        if entry.factors.rank() == 0 || !entry.scaling.is_finite() {
            return Err(
                invalid("the factors have rank 0 or a scaling that is not finite", name).hint("Leave the module out")
            );
        }
    }
    Ok(())
}

fn write_checked(folder: &Path, adapter: &Adapter, base_model: &str) -> Result<()> {
    let mut tensors: Vec<(TensorHeader, &[f32], ElementType)> = Vec::new();
    for (name, AdapterEntry { factors, .. }) in &adapter.linears {
        let (out_features, in_features, rank) = (factors.out_features(), factors.in_features(), factors.rank());
        let element_type = factors.factor_type();
        for (factor, values, shape) in
            [("lora_A", factors.a(), vec![rank, in_features]), ("lora_B", factors.b(), vec![out_features, rank])]
        {
            let name = format!("{PREFIX}{name}.{factor}.weight");
            let bytes = (values.len() * element_type.bits() / 8) as u64;
            tensors.push((TensorHeader { name, dtype: float_dtype(element_type), shape, bytes }, values, element_type));
        }
        if let Some(bias) = factors.bias() {
            let (name, dtype) = (format!("{PREFIX}{name}.{BIAS}"), float_dtype(ElementType::F32));
            let header = TensorHeader { name, dtype, shape: vec![out_features], bytes: 4 * out_features as u64 };
            tensors.push((header, &bias.values, ElementType::F32));
        }
    }
    tensors.sort_by(|(left, ..), (right, ..)| file_order(left, right));
    let mut writer = SafetensorsWriter::create(&folder.join(WEIGHTS), tensors.iter().map(|(header, ..)| header))?;
    for (_, values, element_type) in &tensors {
        writer.write(&float_bytes(values, *element_type))?;
    }
    writer.finish()?;
    FactorScales::write(folder, adapter)?;
    FactorCentres::write(folder, adapter)?;
    let config = format!("{:#}\n", PeftConfig::to_json(adapter, base_model));
    write_synced(&folder.join(PeftConfig::FILE_NAME), config.as_bytes())
}

pub(crate) fn invalid(message: impl Into<String>, subject: impl std::fmt::Display) -> Error {
    Error::new(ErrorCode::AdapterInvalid, message).subject(subject)
}
