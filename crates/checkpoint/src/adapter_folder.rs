use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use kintsugi_runtime::{Error, ErrorCode, Result};
use kintsugi_weights::{DenseMatrix, ElementType, LowRank};

use crate::factor_biases::{self, FactorBiases, bias_module};
use crate::factor_centres::FactorCentres;
use crate::factor_rows::FactorRows;
use crate::factor_scales::FactorScales;
use crate::peft_adapter::invalid;
use crate::peft_config::PeftConfig;
use crate::safetensors_writer::float_dtype;
use crate::tensor_set::TensorSet;
use crate::torch_archive::TorchArchive;

pub(crate) const WEIGHTS: &str = "adapter_model.safetensors";
const TORCH_WEIGHTS: &str = "adapter_model.bin";
/// What PEFT puts in front of every module path.
pub(crate) const PREFIX: &str = "base_model.model.";

/// What is adapted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModuleKind {
    /// `lora_A [rank, in]`, `lora_B [out, rank]`. Also of Conv1D layers, whose weights lie transposed in the base.
    Linear,
    /// `lora_embedding_A [rank, vocabulary]`, `lora_embedding_B [width, rank]`: the update of the transposed table.
    Embedding,
}

impl ModuleKind {
    /// The keys of A and B behind the module path.
    pub(crate) fn keys(self) -> [&'static str; 2] {
        match self {
            ModuleKind::Linear => ["lora_A.weight", "lora_B.weight"],
            ModuleKind::Embedding => ["lora_embedding_A", "lora_embedding_B"],
        }
    }
}

/// The factors of one module, as the headers and the config tell.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterModule {
    /// Path in the base model.
    pub name: String,
    /// What it is.
    pub kind: ModuleKind,
    /// Rows of the update.
    pub out_features: usize,
    /// Columns of the update.
    pub in_features: usize,
    /// Columns of B and rows of A.
    pub rank: usize,
    /// What B A is multiplied with, as peft computes it: `alpha / rank`, or `alpha / √rank` for rsLoRA.
    pub scaling: f64,
    /// Type of the factors; f32 where they have two.
    pub element_type: ElementType,
}

/// A tensor of a module that was trained and saved whole (`modules_to_save`), as the header tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WholeTensor {
    /// Path in the base model, e.g. `lm_head.weight`.
    pub name: String,
    /// F32, F16 or BF16.
    pub element_type: ElementType,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// Length of the data.
    pub bytes: u64,
}

/// A PEFT folder, opened and checked; factors are read module by module.
///
/// It holds `adapter_config.json` and `adapter_model.safetensors`, or the older `adapter_model.bin`. Tensors are
/// `base_model.model.PATH.lora_A.weight` and so on, or with the name of the adapter before or instead of `weight`.
/// Module paths keep their case.
#[derive(Debug)]
pub struct AdapterFolder {
    path: PathBuf,
    config: PeftConfig,
    weights: Weights,
    modules: Vec<AdapterModule>,
    /// Names of A and B by module.
    keys: BTreeMap<String, [String; 2]>,
    /// In name order.
    whole: Vec<WholeTensor>,
    /// Where the factors are quantized.
    scales: Option<FactorScales>,
    /// Where the update is affine.
    biases: Option<FactorBiases>,
}

#[derive(Debug)]
enum Weights {
    Safetensors(TensorSet),
    Torch(TorchArchive),
}

impl Weights {
    fn open(folder: &Path) -> Result<Self> {
        let path = folder.join(WEIGHTS);
        let torch = folder.join(TORCH_WEIGHTS);
        if path.exists() {
            return TensorSet::open_file(&path).map(Weights::Safetensors).map_err(as_adapter_error);
        }
        if torch.exists() {
            return TorchArchive::open(&torch).map(Weights::Torch);
        }
        Err(invalid(format!("{WEIGHTS} is missing"), folder.display()).hint("The folder is incomplete; copy it again"))
    }

    /// Name, shape and, where it is a float that factors can have, type of each tensor.
    fn tensors(&self) -> Vec<(String, Vec<usize>, Option<ElementType>)> {
        match self {
            Weights::Safetensors(set) => set
                .iter()
                .map(|info| {
                    let element_type = ElementType::from_name(&info.dtype.to_ascii_lowercase());
                    (info.name.clone(), info.shape.clone(), element_type)
                })
                .collect(),
            Weights::Torch(archive) => {
                archive.tensors().map(|(name, shape, kind)| (name.to_string(), shape.to_vec(), Some(kind))).collect()
            }
        }
    }

    fn matrix(&self, name: &str) -> Result<DenseMatrix> {
        match self {
            Weights::Safetensors(set) => set.matrix(name).map_err(as_adapter_error),
            Weights::Torch(archive) => archive.matrix(name),
        }
    }

    /// What the header says about a tensor of a module that is saved whole.
    fn whole_tensor(&self, key: &str, path: &str, shape: Vec<usize>) -> Result<WholeTensor> {
        let Weights::Safetensors(set) = self else { return Err(no_whole_tensors(key)) };
        let info = set.get(key).ok_or_else(|| not_a_factor(key))?;
        let element_type = ElementType::from_name(&info.dtype.to_ascii_lowercase()).ok_or_else(|| {
            invalid("the tensor is neither F32 nor F16 nor BF16", key).hint("Save the adapter in one of these")
        })?;
        Ok(WholeTensor { name: path.to_string(), element_type, shape, bytes: info.bytes })
    }
}

/// Whether a tensor belongs to what `modules_to_save` calls `name`.
fn saves(name: &str, tensor: &WholeTensor) -> bool {
    format!(".{}", tensor.name).contains(&format!(".{name}."))
}

fn no_whole_tensors(tensor: &str) -> Error {
    invalid("modules that are saved whole are read from safetensors only", tensor)
        .hint("Save the adapter again with PEFT, which writes safetensors")
}

impl AdapterFolder {
    /// The files of a folder, as far as they are there.
    pub(crate) const FILE_NAMES: [&'static str; 5] =
        [PeftConfig::FILE_NAME, WEIGHTS, TORCH_WEIGHTS, FactorScales::FILE_NAME, FactorCentres::FILE_NAME];

    /// Reads the config and the headers, and checks them against each other.
    ///
    /// # Errors
    /// `ERR_ADAPTER_INVALID` for everything that is missing, damaged or not a plain LoRA; also for biases beside B,
    /// without which the factors are another function.
    pub fn open(folder: &Path) -> Result<Self> {
        Self::open_with_biases(folder)?.without_biases()
    }

    /// As [`AdapterFolder::open`], but there may be biases beside B: [`AdapterFolder::factors`] has them.
    pub(crate) fn open_with_biases(folder: &Path) -> Result<Self> {
        let config = PeftConfig::read(&folder.join(PeftConfig::FILE_NAME))?;
        if !config.modules_to_save.is_empty() {
            return Err(invalid(
                "'modules_to_save' is set: fully trained modules are not supported",
                folder.join(PeftConfig::FILE_NAME).display(),
            )
            .hint("Merge it into the base model with PEFT, or train a plain LoRA"));
        }
        Self::with_config(folder, config)
    }

    /// As [`AdapterFolder::open`], but modules that are saved whole may be there beside the factors.
    ///
    /// # Errors
    /// As [`AdapterFolder::open`], also when `modules_to_save` names what the weights do not hold.
    pub fn open_with_whole_modules(folder: &Path) -> Result<Self> {
        Self::with_config(folder, PeftConfig::read(&folder.join(PeftConfig::FILE_NAME))?)?.without_biases()
    }

    fn without_biases(self) -> Result<Self> {
        if self.biases.is_some() { Err(factor_biases::refused(&self.path)) } else { Ok(self) }
    }

    fn with_config(folder: &Path, config: PeftConfig) -> Result<Self> {
        let weights = Weights::open(folder)?;
        let mut whole = Vec::new();
        let mut pairs: BTreeMap<(String, bool), FactorPair> = BTreeMap::new();
        let (mut tables, mut biases) = (Vec::new(), BTreeMap::new());
        for (name, shape, element_type) in weights.tensors() {
            if let Some(module) = base_table(&name) {
                tables.push((module.to_string(), name));
                continue;
            }
            if let Some(path) = name.strip_prefix(PREFIX).filter(|path| config.saves_whole(path))
                && parse_key(&name).is_none()
            {
                whole.push(weights.whole_tensor(&name, path, shape)?);
                continue;
            }
            if let Some(module) = bias_module(&name).filter(|_| config.lora_bias) {
                if let Some((first, _)) = biases.insert(module.to_string(), (name.clone(), shape)) {
                    return Err(twice("bias", &first, &name));
                }
                continue;
            }
            let (module, kind, factor) = parse_key(&name).ok_or_else(|| not_a_factor(&name))?;
            let pair = pairs.entry((module.to_string(), kind == ModuleKind::Embedding)).or_default();
            let slot = if factor == Factor::A { &mut pair.a } else { &mut pair.b };
            if let Some(first) = slot {
                return Err(twice("factor", &first.name, &name));
            }
            let &[rows, columns] = shape.as_slice() else {
                let message = format!("the factor has {} dimensions, only factors of Linears are read", shape.len());
                return Err(invalid(message, &name).hint("Convolutions are not supported; merge them with PEFT"));
            };
            let element_type = element_type.ok_or_else(|| {
                invalid("the factor is neither F32 nor F16 nor BF16", &name).hint("Save the adapter in one of these")
            })?;
            *slot = Some(FactorTensor { name, rows, columns, element_type });
        }
        if let Some((_, name)) = tables.into_iter().find(|(module, _)| !pairs.contains_key(&(module.clone(), true))) {
            return Err(not_a_factor(&name));
        }
        if pairs.is_empty() {
            return Err(
                invalid("the adapter holds no factors", folder.display()).hint("Save the adapter again with PEFT")
            );
        }
        let (mut modules, mut keys) = (Vec::new(), BTreeMap::new());
        for ((name, embedding), pair) in pairs {
            let kind = if embedding { ModuleKind::Embedding } else { ModuleKind::Linear };
            let (module, names) = pair.check(&config, name, kind)?;
            if keys.insert(module.name.clone(), names).is_some() {
                return Err(invalid("the module has factors of a Linear and of an embedding", &module.name)
                    .hint("Save the adapter again with PEFT"));
            }
            modules.push(module);
        }
        if let Some(name) = config.modules_to_save.iter().find(|name| !whole.iter().any(|found| saves(name, found))) {
            let message = format!("'modules_to_save' names '{name}', of which the weights hold nothing");
            return Err(invalid(message, folder.join(PeftConfig::FILE_NAME).display())
                .hint("Config and weights may belong to different adapters"));
        }
        whole.sort_by(|left: &WholeTensor, right| left.name.cmp(&right.name));
        let scales = FactorScales::open(folder)?;
        let biases = match (config.lora_bias, &weights) {
            (false, _) => None,
            (true, Weights::Safetensors(_)) => {
                let outputs = modules.iter().map(|module| (module.name.as_str(), module.out_features));
                Some(FactorBiases::open(folder, biases, outputs)?)
            }
            (true, Weights::Torch(_)) => return Err(factor_biases::unreadable(folder)),
        };
        Ok(AdapterFolder { path: folder.to_path_buf(), config, weights, modules, keys, whole, scales, biases })
    }

    /// The tensors of modules that are saved whole, in name order.
    pub fn whole_tensors(&self) -> &[WholeTensor] {
        &self.whole
    }

    /// The names under `modules_to_save`: ends of module paths.
    pub fn modules_to_save(&self) -> &[String] {
        &self.config.modules_to_save
    }

    /// Fills `buffer` with the bytes of a whole tensor from its byte `start` on.
    ///
    /// # Errors
    /// `ERR_ADAPTER_INVALID` when there is no such tensor, and what reading reports.
    pub fn read_whole(&self, tensor: &str, start: u64, buffer: &mut [u8]) -> Result<()> {
        match &self.weights {
            Weights::Safetensors(set) => {
                let (file, stored) = set.require(&format!("{PREFIX}{tensor}")).map_err(as_adapter_error)?;
                file.read_part(stored, start, buffer).map_err(as_adapter_error)
            }
            Weights::Torch(_) => Err(no_whole_tensors(tensor)),
        }
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The base model that the adapter says it belongs to.
    pub fn base_model(&self) -> Option<&str> {
        self.config.base_model.as_deref()
    }

    /// The kind of model that the adapter says it belongs to (`CAUSAL_LM`).
    pub fn task_type(&self) -> Option<&str> {
        self.config.task_type.as_deref()
    }

    /// Whether the base keeps these weights as `[in, out]` (Conv1D of GPT-2). The factors do not care.
    pub fn fan_in_fan_out(&self) -> bool {
        self.config.fan_in_fan_out
    }

    /// Whether the last parts of the module paths name the modules, so that every module of that name is adapted.
    pub fn targets_by_suffix(&self) -> bool {
        self.config.targets_by_suffix
    }

    /// The modules, in name order.
    pub fn modules(&self) -> &[AdapterModule] {
        &self.modules
    }

    /// The module of that name.
    pub fn module(&self, name: &str) -> Option<&AdapterModule> {
        self.modules.iter().find(|module| module.name == name)
    }

    /// A `[rank, in]` and B `[out, rank]` of a module as they are stored.
    ///
    /// # Errors
    /// `ERR_ADAPTER_INVALID` when they are damaged, hold NaN or infinite values, or the module has none.
    pub fn stored_factors(&self, module: &str) -> Result<[DenseMatrix; 2]> {
        let [a, b] = self.keys_of(module)?;
        Ok([self.weights.matrix(a)?, self.weights.matrix(b)?])
    }

    /// As [`AdapterFolder::stored_factors`], but nothing is read before rows are asked for. `None` for the older
    /// `adapter_model.bin`, whose tensors need not lie row after row.
    ///
    /// # Errors
    /// `ERR_ADAPTER_INVALID` when the module has no factors, or tensors that are no matrices of floats.
    pub fn factor_rows(&self, module: &str) -> Result<Option<[FactorRows<'_>; 2]>> {
        let [a, b] = self.keys_of(module)?;
        let Weights::Safetensors(set) = &self.weights else { return Ok(None) };
        Ok(Some([factor_rows(set, a)?, factor_rows(set, b)?]))
    }

    fn keys_of(&self, module: &str) -> Result<&[String; 2]> {
        self.keys.get(module).ok_or_else(|| invalid("the adapter has no such module", module).hint("Check the name"))
    }

    /// The factors of a module in their own type; a pair of two types becomes f32. Quantized ones come with their codes,
    /// those of an affine update with their bias.
    ///
    /// # Errors
    /// As [`AdapterFolder::stored_factors`].
    pub fn factors(&self, module: &str) -> Result<LowRank> {
        let [a, b] = self.stored_factors(module)?;
        let factor_type = if a.element_type() == b.element_type() { a.element_type() } else { ElementType::F32 };
        let plain = LowRank::new(b.rows(), a.columns(), a.rows(), b.to_f32(), a.to_f32(), factor_type);
        let factors = match &self.scales {
            Some(scales) if scales.has(module) => LowRank::of_codes(scales.codes(module, &plain)?),
            _ => plain,
        };
        match (&self.biases, &self.weights) {
            (Some(biases), Weights::Safetensors(weights)) => {
                let bias = biases.of(weights, module, factors.rank())?;
                Ok(bias.into_iter().fold(factors, LowRank::with_bias))
            }
            _ => Ok(factors),
        }
    }
}

/// The name of `modules_to_save` that covers a module: PEFT replaces what matches `(^|.*\.)name($|\..*)` as a whole, and
/// whatever factors are there have no effect.
pub fn saved_whole<'a>(names: &'a [String], module: &str) -> Option<&'a str> {
    let path = format!(".{module}.");
    names.iter().map(String::as_str).find(|name| path.contains(&format!(".{name}.")))
}

fn factor_rows<'a>(set: &'a TensorSet, name: &'a str) -> Result<FactorRows<'a>> {
    let (file, tensor) = set.require(name).map_err(as_adapter_error)?;
    let element_type = ElementType::ALL.into_iter().find(|&element_type| float_dtype(element_type) == tensor.dtype);
    match (tensor.shape.as_slice(), element_type) {
        (&[rows, columns], Some(element_type)) => Ok(FactorRows { name, file, tensor, rows, columns, element_type }),
        _ => Err(not_a_factor(name)),
    }
}

/// What the header says about a factor.
struct FactorTensor {
    name: String,
    rows: usize,
    columns: usize,
    element_type: ElementType,
}

/// The two factors of a module.
#[derive(Default)]
struct FactorPair {
    a: Option<FactorTensor>,
    b: Option<FactorTensor>,
}

impl FactorPair {
    fn check(self, config: &PeftConfig, name: String, kind: ModuleKind) -> Result<(AdapterModule, [String; 2])> {
        let (a, b) = match (self.a, self.b) {
            (Some(a), Some(b)) => (a, b),
            (a, _) => {
                let absent = if a.is_none() { "lora_A" } else { "lora_B" };
                return Err(
                    invalid(format!("the module has no {absent}"), name).hint("Save the adapter again with PEFT")
                );
            }
        };
        if a.columns == 0 || b.rows == 0 || a.rows == 0 {
            return Err(invalid("the factors are empty", name).hint("Save the adapter again with PEFT"));
        }
        let rank = config.rank(&name);
        if (a.rows, b.columns) != (rank, rank) {
            let (a_rank, b_rank) = (a.rows, b.columns);
            let message = format!("lora_A has rank {a_rank}, lora_B {b_rank}, {} says {rank}", PeftConfig::FILE_NAME);
            return Err(invalid(message, name).hint("Config and weights may belong to different adapters"));
        }
        let module = AdapterModule {
            scaling: config.scaling(&name),
            name,
            kind,
            out_features: b.rows,
            in_features: a.columns,
            rank,
            element_type: if a.element_type == b.element_type { a.element_type } else { ElementType::F32 },
        };
        Ok((module, [a.name, b.name]))
    }
}

#[derive(PartialEq, Eq)]
enum Factor {
    A,
    B,
}

/// Module path, kind and factor of a key, with or without the name of the adapter.
fn parse_key(key: &str) -> Option<(&str, ModuleKind, Factor)> {
    let path = key.strip_prefix(PREFIX)?;
    // PATH.lora_A.weight, PATH.lora_A.NAME.weight, PATH.lora_embedding_A, PATH.lora_embedding_A.NAME
    let inner = path.strip_suffix(".weight");
    for path in [inner.unwrap_or(path), inner.unwrap_or(path).rsplit_once('.').map_or("", |(path, _)| path)] {
        let Some((module, last)) = path.rsplit_once('.').filter(|(module, _)| !module.is_empty()) else { continue };
        let (kind, factor) = match last {
            "lora_A" => (ModuleKind::Linear, Factor::A),
            "lora_B" => (ModuleKind::Linear, Factor::B),
            "lora_embedding_A" => (ModuleKind::Embedding, Factor::A),
            "lora_embedding_B" => (ModuleKind::Embedding, Factor::B),
            _ => continue,
        };
        return (inner.is_some() == (kind == ModuleKind::Linear)).then_some((module, kind, factor));
    }
    None
}

/// The module of a table that PEFT saves beside the factors of an embedding: that of the base, which it does not train.
fn base_table(key: &str) -> Option<&str> {
    key.strip_prefix(PREFIX)?.strip_suffix(".base_layer.weight")
}

fn twice(what: &str, first: &str, name: &str) -> Error {
    invalid(format!("the module has this {what} twice, also as '{first}'"), name)
        .hint("The file may hold several adapters; save one of them")
}

/// Says what a tensor is that is no factor.
fn not_a_factor(name: &str) -> Error {
    let what = if name.contains("lora_magnitude_vector") {
        "the tensor is a DoRA magnitude, which is not supported"
    } else if bias_module(name).is_some() {
        "the tensor is a bias beside B, of which the config says nothing ('lora_bias')"
    } else if name.starts_with(PREFIX) && !name.contains("lora_") {
        "the tensor is a fully trained module (modules_to_save) or bias, which is not supported"
    } else {
        "the tensor is no factor of a Linear (lora_A.weight or lora_B.weight)"
    };
    invalid(what, name).hint("Only plain LoRA adapters of Linears and embeddings are read; merge others with PEFT")
}

/// Damage of the file or of a tensor in it, seen from the adapter.
pub(crate) fn as_adapter_error(error: Error) -> Error {
    let code = if error.code == ErrorCode::Io { error.code } else { ErrorCode::AdapterInvalid };
    Error { code, ..error }
}
