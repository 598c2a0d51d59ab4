use std::collections::BTreeMap;
use std::path::Path;

use kintsugi_runtime::{Error, ErrorCode, Result, StagedFolder};
use kintsugi_weights::{Adapter, AdapterEntry, DenseMatrix, ElementType, LowRank};

use crate::peft_config::PeftConfig;
use crate::safetensors_writer::{SafetensorsWriter, TensorHeader, file_order, float_bytes, float_dtype, write_synced};
use crate::tensor_set::TensorSet;

const WEIGHTS: &str = "adapter_model.safetensors";
/// What PEFT puts in front of every module path.
const PREFIX: &str = "base_model.model.";

/// Reads a PEFT folder: `adapter_config.json` and `adapter_model.safetensors`.
///
/// Tensors are `base_model.model.PATH.lora_A.weight` `[rank, in]` and `….lora_B.weight` `[out, rank]`, or with the
/// name of the adapter before `weight`. Module paths keep their case. Factors keep their type; a pair of two types
/// becomes f32.
///
/// # Errors
/// `ERR_ADAPTER_INVALID` for everything that is missing, damaged, not finite or not a plain LoRA of Linears.
pub fn read_adapter(folder: &Path) -> Result<Adapter> {
    let config_path = folder.join(PeftConfig::FILE_NAME);
    let config = PeftConfig::read(&config_path)?;
    let path = folder.join(WEIGHTS);
    if !path.exists() {
        let hint = if folder.join("adapter_model.bin").exists() {
            "It holds adapter_model.bin; save the adapter again with PEFT and safe_serialization=True"
        } else {
            "The folder is incomplete; copy it again"
        };
        return Err(invalid(format!("{WEIGHTS} is missing"), folder.display()).hint(hint));
    }
    let tensors = TensorSet::open_file(&path).map_err(as_adapter_error)?;

    let mut pairs: BTreeMap<&str, FactorPair<'_>> = BTreeMap::new();
    for info in tensors.iter() {
        let (module, factor) = parse_key(&info.name).ok_or_else(|| {
            invalid("the tensor is no factor of a Linear (lora_A.weight or lora_B.weight)", &info.name)
                .hint("Only plain LoRA adapters of Linears are read; merge others with PEFT")
        })?;
        let pair = pairs.entry(module).or_default();
        let slot = if factor == Factor::A { &mut pair.a } else { &mut pair.b };
        if let Some(first) = slot.replace(&info.name) {
            return Err(invalid(format!("the module has this factor twice, also as '{first}'"), &info.name)
                .hint("The file may hold several adapters; save one of them"));
        }
    }
    if pairs.is_empty() {
        return Err(invalid("the adapter holds no factors", path.display()).hint("Save the adapter again with PEFT"));
    }

    let mut linears = BTreeMap::new();
    for (module, pair) in pairs {
        let (Some(a_name), Some(b_name)) = (pair.a, pair.b) else {
            let absent = if pair.a.is_none() { "lora_A" } else { "lora_B" };
            return Err(invalid(format!("the module has no {absent}"), module).hint("Save the adapter again with PEFT"));
        };
        let a = tensors.matrix(a_name).map_err(as_adapter_error)?;
        let b = tensors.matrix(b_name).map_err(as_adapter_error)?;
        let rank = config.rank(module);
        if (a.rows(), b.columns()) != (rank, rank) {
            let (a_rank, b_rank) = (a.rows(), b.columns());
            let message = format!("lora_A has rank {a_rank}, lora_B {b_rank}, {} says {rank}", PeftConfig::FILE_NAME);
            return Err(invalid(message, module).hint("Config and weights may belong to different adapters"));
        }
        let factors = low_rank(&b, &a);
        linears.insert(module.to_string(), AdapterEntry { factors, scaling: config.scaling(module) });
    }
    Ok(Adapter { linears, base_model: config.base_model })
}

/// Writes a PEFT folder that appears whole or not at all.
///
/// Factors are stored in their own type, unscaled; the scaling is expressed by the alpha of each module, so that PEFT
/// computes it exactly and reading gives the same adapter. `r` is the largest rank, every rank stands in
/// `rank_pattern` and every alpha in `alpha_pattern` under the full module path, and at scaling 1 both maps are
/// identical. `base_model` becomes `base_model_name_or_path`.
///
/// # Errors
/// `ERR_ADAPTER_INVALID` when there are no factors or a name cannot be written, `ERR_OUTPUT_NOT_EMPTY`,
/// `ERR_OUTPUT_UNWRITABLE`.
pub fn write_adapter(folder: &Path, adapter: &Adapter, base_model: &str) -> Result<()> {
    check_writable(adapter)?;
    let staged = StagedFolder::create(folder)?;
    write_adapter_files(staged.path(), adapter, base_model)?;
    staged.commit()
}

/// Names are used as regular expressions by PEFT, and a rank of zero is refused by it.
fn check_writable(adapter: &Adapter) -> Result<()> {
    if adapter.linears.is_empty() {
        return Err(invalid("there are no factors to write", "adapter").hint("Use a rank of at least 1"));
    }
    for (name, entry) in &adapter.linears {
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

fn write_adapter_files(folder: &Path, adapter: &Adapter, base_model: &str) -> Result<()> {
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
    }
    tensors.sort_by(|(left, ..), (right, ..)| file_order(left, right));
    let mut writer = SafetensorsWriter::create(&folder.join(WEIGHTS), tensors.iter().map(|(header, ..)| header))?;
    for (_, values, element_type) in &tensors {
        writer.write(&float_bytes(values, *element_type))?;
    }
    writer.finish()?;
    let config = format!("{:#}\n", PeftConfig::to_json(adapter, base_model));
    write_synced(&folder.join(PeftConfig::FILE_NAME), config.as_bytes())
}

/// The names of the two factors of a module.
#[derive(Default)]
struct FactorPair<'a> {
    a: Option<&'a str>,
    b: Option<&'a str>,
}

#[derive(PartialEq, Eq)]
enum Factor {
    A,
    B,
}

/// Module path and factor of a key, with or without the name of the adapter.
fn parse_key(key: &str) -> Option<(&str, Factor)> {
    let path = key.strip_prefix(PREFIX)?.strip_suffix(".weight")?;
    let (module, last) = path.rsplit_once('.')?;
    let (module, factor) = match last {
        "lora_A" | "lora_B" => (module, last),
        _ => module.rsplit_once('.')?,
    };
    match factor {
        "lora_A" if !module.is_empty() => Some((module, Factor::A)),
        "lora_B" if !module.is_empty() => Some((module, Factor::B)),
        _ => None,
    }
}

fn low_rank(b: &DenseMatrix, a: &DenseMatrix) -> LowRank {
    let factor_type = if a.element_type() == b.element_type() { a.element_type() } else { ElementType::F32 };
    LowRank::new(b.rows(), a.columns(), a.rows(), b.to_f32(), a.to_f32(), factor_type)
}

fn invalid(message: impl Into<String>, subject: impl std::fmt::Display) -> Error {
    Error::new(ErrorCode::AdapterInvalid, message).subject(subject)
}

/// Damage of the file or of a tensor in it, seen from the adapter.
fn as_adapter_error(error: Error) -> Error {
    let code = if error.code == ErrorCode::Io { error.code } else { ErrorCode::AdapterInvalid };
    Error { code, ..error }
}
