use std::path::Path;

use kintsugi_runtime::{Error, ErrorCode, Result, StagedFolder};
use kintsugi_weights::{ElementType, LowRank};
use serde_json::{Map, Value, json};

use crate::adapter_folder::{PREFIX, WEIGHTS};
use crate::peft_adapter::invalid;
use crate::peft_config::PeftConfig;
use crate::safetensors_writer::{SafetensorsWriter, TensorHeader, file_order, float_bytes, float_dtype, write_synced};
use crate::{ModuleKind, WholeTensor};

/// What is said about an adapter that will be written; every scaling is 1.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterDescription {
    /// `base_model_name_or_path`.
    pub base_model: Option<String>,
    /// `task_type`.
    pub task_type: Option<String>,
    /// The base keeps the adapted weights as `[in, out]`.
    pub fan_in_fan_out: bool,
    /// Name the targets by the last parts of their paths, else by their paths.
    pub targets_by_suffix: bool,
    /// Type of the factors.
    pub element_type: ElementType,
    /// `modules_to_save`: ends of the paths of modules that are saved whole.
    pub modules_to_save: Vec<String>,
}

/// A module of an adapter that will be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MergedModule {
    /// Path in the base model.
    pub name: String,
    /// What it is.
    pub kind: ModuleKind,
    /// Rows of the update.
    pub out_features: usize,
    /// Columns of the update.
    pub in_features: usize,
    /// Columns of B and rows of A in the file; fewer that are written are filled up with zeros.
    pub rank: usize,
}

/// Writes a PEFT folder module by module; it appears whole or not at all.
///
/// `r` and `lora_alpha` are the largest rank, so that every scaling is 1 in readers that know no patterns (vLLM).
/// Modules of other ranks stand in `rank_pattern` and `alpha_pattern`.
#[derive(Debug)]
pub struct AdapterWriter {
    staged: StagedFolder,
    writer: SafetensorsWriter,
    description: AdapterDescription,
    modules: Vec<MergedModule>,
    next: usize,
    /// With the number of modules before each.
    whole: Vec<(WholeTensor, usize)>,
    next_whole: usize,
}

impl AdapterWriter {
    /// Begins a folder that will hold `modules`, which are sorted by name, and tensors that are `whole`.
    ///
    /// # Errors
    /// `ERR_ADAPTER_INVALID` when there are no modules, a name cannot be written, a rank is 0 or a whole tensor has a
    /// place between two factors, `ERR_OUTPUT_NOT_EMPTY`, `ERR_OUTPUT_UNWRITABLE`.
    pub fn create(
        folder: &Path,
        description: AdapterDescription,
        mut modules: Vec<MergedModule>,
        whole: &[WholeTensor],
    ) -> Result<Self> {
        // As the keys of the factors sort, in which a dot follows the name.
        modules.sort_by_cached_key(|module| format!("{}.", module.name));
        if modules.is_empty() {
            return Err(invalid("there are no factors to write", "adapter").hint("Give adapters that have some"));
        }
        for module in &modules {
            let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
            if module.name.is_empty() || !module.name.chars().all(plain) || module.rank == 0 {
                return Err(invalid(
                    "the module has rank 0 or a name that PEFT would take for a pattern",
                    &module.name,
                )
                .hint("Use letters, digits, dots, underscores and hyphens"));
            }
        }
        let mut headers: Vec<TensorHeader> =
            modules.iter().flat_map(|module| factor_headers(module, description.element_type)).collect();
        debug_assert!(headers.is_sorted_by(|left, right| file_order(left, right).is_le()));
        let factors = headers.len();
        headers.extend(whole.iter().map(whole_header));
        let mut places: Vec<usize> = (0..headers.len()).collect();
        places.sort_by(|&left, &right| file_order(&headers[left], &headers[right]));
        let mut before = 0usize;
        let mut placed = Vec::new();
        for &place in &places {
            match place.checked_sub(factors) {
                Some(index) if before.is_multiple_of(2) => placed.push((whole[index].clone(), before / 2)),
                Some(index) => {
                    let message = "the tensor is saved whole and belongs between the two factors of a module";
                    return Err(invalid(message, &whole[index].name).hint("Give adapters that have one or the other"));
                }
                None => before += 1,
            }
        }
        let ordered = places.iter().map(|&place| &headers[place]);
        let staged = StagedFolder::create(folder)?;
        let writer = SafetensorsWriter::create(&staged.path().join(WEIGHTS), ordered)?;
        Ok(AdapterWriter { staged, writer, description, modules, next: 0, whole: placed, next_whole: 0 })
    }

    /// The modules in the order in which they are written.
    pub fn modules(&self) -> &[MergedModule] {
        &self.modules
    }

    /// Where other files of the folder may be written until it is finished.
    pub fn folder(&self) -> &Path {
        self.staged.path()
    }

    /// Bytes of the weights file when it is whole.
    pub fn total_bytes(&self) -> u64 {
        self.writer.total()
    }

    /// Writes the whole tensors that come before the next module in the file, or at its end: `copy` hands their bytes
    /// on. Must be called before each module and before [`AdapterWriter::finish`] where there are any.
    ///
    /// # Errors
    /// `ERR_OUTPUT_UNWRITABLE`, and what `copy` reports.
    pub fn write_whole(
        &mut self,
        mut copy: impl FnMut(&WholeTensor, &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()>,
    ) -> Result<()> {
        while let Some((tensor, before)) = self.whole.get(self.next_whole)
            && *before <= self.next
        {
            let writer = &mut self.writer;
            copy(tensor, &mut |bytes| writer.write(bytes))?;
            self.next_whole += 1;
        }
        Ok(())
    }

    /// Writes the next module as bytes: `copy` hands on those of A `[rank, in]` and then of B `[out, rank]`, in the type
    /// of the file.
    ///
    /// # Errors
    /// `ERR_OUTPUT_UNWRITABLE`, what `copy` reports, `ERR_INTERNAL` when it gives more or less than that.
    pub fn write_stored(&mut self, copy: impl FnOnce(&mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()>) -> Result<()> {
        let module = self.modules.get(self.next).ok_or_else(|| internal("more modules than were announced"))?;
        let mut left: u64 =
            factor_headers(module, self.description.element_type).iter().map(|header| header.bytes).sum();
        self.next += 1;
        let writer = &mut self.writer;
        copy(&mut |bytes| {
            left = left.checked_sub(bytes.len() as u64).ok_or_else(|| internal("more factors than the module has"))?;
            writer.write(bytes)
        })?;
        if left == 0 { Ok(()) } else { Err(internal("fewer factors than the module has")) }
    }

    /// Writes the factors of the next module, `None` for zeros.
    ///
    /// # Errors
    /// `ERR_OUTPUT_UNWRITABLE`; `ERR_INTERNAL` for factors that are not those of the module.
    pub fn write(&mut self, factors: Option<&LowRank>) -> Result<()> {
        let module = self.modules.get(self.next).ok_or_else(|| internal("more modules than were announced"))?;
        self.next += 1;
        let (rank, element_type) = (module.rank, self.description.element_type);
        let found = factors.map_or(0, LowRank::rank);
        if factors.is_some_and(|f| (f.out_features(), f.in_features()) != (module.out_features, module.in_features))
            || found > rank
        {
            return Err(internal("factors that do not fit their module"));
        }
        let (b, a) = factors.map_or((&[][..], &[][..]), |factors| (factors.b(), factors.a()));
        self.writer.write(&float_bytes(a, element_type))?;
        self.writer.write(&vec![0; (rank - found) * module.in_features * element_type.bits() / 8])?;
        if found == rank {
            return self.writer.write(&float_bytes(b, element_type));
        }
        let mut padded = vec![0.0; rank * module.out_features];
        for (row, values) in padded.chunks_exact_mut(rank).zip(b.chunks_exact(found.max(1))) {
            row[..found].copy_from_slice(values);
        }
        self.writer.write(&float_bytes(&padded, element_type))
    }

    /// Writes the config and gives the folder its name. Gives the bytes of the weights.
    ///
    /// # Errors
    /// `ERR_OUTPUT_UNWRITABLE`.
    pub fn finish(self) -> Result<u64> {
        let bytes = self.writer.finish()?;
        let config = format!("{:#}\n", config(&self.description, &self.modules));
        write_synced(&self.staged.path().join(PeftConfig::FILE_NAME), config.as_bytes())?;
        self.staged.commit()?;
        Ok(bytes)
    }
}

fn whole_header(tensor: &WholeTensor) -> TensorHeader {
    TensorHeader {
        name: format!("{PREFIX}{}", tensor.name),
        dtype: float_dtype(tensor.element_type),
        shape: tensor.shape.clone(),
        bytes: tensor.bytes,
    }
}

/// A and B, in the order of the file.
fn factor_headers(module: &MergedModule, element_type: ElementType) -> [TensorHeader; 2] {
    let MergedModule { name, kind, out_features, in_features, rank } = module;
    let header = |key: &str, rows: usize, columns: usize| TensorHeader {
        name: format!("{PREFIX}{name}.{key}"),
        dtype: float_dtype(element_type),
        shape: vec![rows, columns],
        bytes: (rows * columns * element_type.bits() / 8) as u64,
    };
    let [a, b] = kind.keys();
    [header(a, *rank, *in_features), header(b, *out_features, *rank)]
}

fn config(description: &AdapterDescription, modules: &[MergedModule]) -> Value {
    let largest = modules.iter().map(|module| module.rank).max().unwrap_or(0);
    let mut targets = std::collections::BTreeSet::new();
    let mut patterns = Map::new();
    for module in modules {
        let last = module.name.rsplit('.').next().unwrap_or(&module.name);
        targets.insert(if description.targets_by_suffix { last } else { &module.name });
        if module.rank != largest {
            patterns.insert(format!("^{}", module.name.replace('.', "\\.")), json!(module.rank));
        }
    }
    json!({
        "peft_type": "LORA",
        "task_type": description.task_type,
        "base_model_name_or_path": description.base_model,
        "revision": null,
        "auto_mapping": null,
        "inference_mode": true,
        "r": largest,
        "lora_alpha": largest,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": description.fan_in_fan_out,
        "init_lora_weights": true,
        "use_rslora": false,
        "use_dora": false,
        "modules_to_save": (!description.modules_to_save.is_empty()).then_some(&description.modules_to_save),
        "layers_pattern": null,
        "layers_to_transform": null,
        "target_modules": targets,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
    })
}

fn internal(message: &str) -> Error {
    Error::new(ErrorCode::Internal, message).subject("adapter")
}
