use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

use kintsugi_checkpoint::{
    AdapterFolder, AdapterModule, Checkpoint, CheckpointWriter, ModuleKind, WholeTensor, saved_whole,
};
use kintsugi_linalg::{MatrixView, product};
use kintsugi_model::DecoderSpec;
use kintsugi_runtime::{CancelToken, Error, ErrorCode, Progress, Result, ThreadPool, peak_memory_bytes};
use kintsugi_weights::{ElementType, LowRank};
use serde::Serialize;

/// What the user asked for.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct FoldRecipe {
    /// Folder of the checkpoint.
    pub checkpoint: PathBuf,
    /// PEFT folder.
    pub adapter: PathBuf,
    /// What the update is multiplied with, beside the scaling of the adapter. Of a module that is saved whole the update
    /// is its difference from that of the base.
    pub weight: f64,
    /// Folder that is written.
    pub out: PathBuf,
    /// Type of the weights that are written; `null` leaves each tensor in its own.
    pub element_type: Option<ElementType>,
}

/// What was done.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct FoldReport {
    /// What was asked.
    pub recipe: FoldRecipe,
    /// Weights to which factors were added.
    pub modules: usize,
    /// Tensors that the adapter holds whole (`modules_to_save`) and that took the place of those of the base.
    pub whole_tensors: usize,
    /// Bytes of the folder.
    pub bytes: u64,
    /// Wall time.
    pub seconds: f64,
    /// Largest resident set of the process so far; `null` where the system does not tell.
    pub peak_memory_bytes: Option<u64>,
}

/// Adds an adapter to the weights of its base model: `W + weight · scaling · B A`, in f64, rounded once; a tensor V that
/// the adapter holds whole makes it `W + weight · (V − W)`, at weight 1 V itself, as peft has it. Tensor by tensor, in
/// bands of rows, so that memory is taken for the factors of one module and a few megabytes. The folder appears whole or
/// not at all.
///
/// # Errors
/// `ERR_ADAPTER_INVALID` when the adapter does not belong to the checkpoint, `ERR_QUANTIZATION_UNSUPPORTED` for a
/// quantized checkpoint, `ERR_VALUE_NOT_FINITE` when the type of a weight cannot hold a sum, `ERR_OPTION_INVALID`,
/// `ERR_OUTPUT_NOT_EMPTY`, `ERR_OUTPUT_UNWRITABLE`, `ERR_CANCELLED`.
pub fn fold_adapter(
    recipe: &FoldRecipe,
    pool: &ThreadPool,
    cancel: &CancelToken,
    progress: &Progress,
) -> Result<FoldReport> {
    let started = Instant::now();
    if !recipe.weight.is_finite() {
        return Err(Error::new(ErrorCode::OptionInvalid, format!("the weight is {}", recipe.weight))
            .subject("weight")
            .hint("Give a finite number"));
    }
    let checkpoint = Checkpoint::open(&recipe.checkpoint)?;
    if checkpoint.quantization().is_some() {
        return Err(Error::new(ErrorCode::QuantizationUnsupported, "an update cannot be added to quantized weights")
            .subject(recipe.checkpoint.display())
            .hint("Fold into the unquantized checkpoint and compress the result"));
    }
    // True of GGUF files, and of them alone.
    if checkpoint.rows_are_outputs() {
        return Err(Error::new(ErrorCode::QuantizationUnsupported, "an update cannot be added to a GGUF file")
            .subject(recipe.checkpoint.display())
            .hint("Make a folder of it first: kintsugi convert FILE.gguf -o FOLDER --format bf16"));
    }
    let adapter = AdapterFolder::open_with_whole_modules(&recipe.adapter)?;
    let targets = targets(&checkpoint, &adapter)?;
    let whole = whole_tensors(&checkpoint, &adapter)?;
    if let Some((module, name)) =
        adapter.modules().iter().find_map(|m| Some((m, saved_whole(adapter.modules_to_save(), &m.name)?)))
    {
        let message =
            format!("the module has factors and is also saved whole, as '{name}': peft would leave the factors out");
        return Err(Error::new(ErrorCode::AdapterInvalid, message)
            .subject(&module.name)
            .hint("Save the adapter with one or the other"));
    }
    let names: Vec<String> = checkpoint.tensors().map(|tensor| tensor.name.clone()).collect();
    progress.begin("fold", names.len() as u64);
    let mut writer = CheckpointWriter::create(&recipe.out, &checkpoint)?.element_type(recipe.element_type);
    for name in &names {
        cancel.check()?;
        progress.at("fold", name.clone());
        let floats = checkpoint
            .tensor(name)
            .is_some_and(|tensor| ElementType::from_name(&tensor.dtype.to_ascii_lowercase()).is_some());
        match (targets.get(name), whole.get(name)) {
            (Some(module), _) => {
                let update = RowUpdate::new(&adapter, module, recipe.weight)?;
                writer.transform(name, recipe.element_type, |first, band| {
                    cancel.check()?;
                    update.add(first, band, pool);
                    Ok(())
                })?;
            }
            (None, Some(tensor)) => {
                let (width, row) = (tensor.element_type.bits() / 8, tensor.shape.iter().skip(1).product::<usize>());
                writer.transform(name, recipe.element_type, |first, band| {
                    cancel.check()?;
                    let mut bytes = vec![0; band.len() * width];
                    adapter.read_whole(&tensor.name, (first * row * width) as u64, &mut bytes)?;
                    for (value, saved) in band.iter_mut().zip(tensor.element_type.widen(&bytes)) {
                        let (from, to) = (f64::from(*value), f64::from(saved));
                        *value = if recipe.weight == 1.0 { saved } else { (from + recipe.weight * (to - from)) as f32 };
                    }
                    Ok(())
                })?;
            }
            (None, None) if floats && recipe.element_type.is_some() => {
                writer.transform(name, recipe.element_type, |_, _| Ok(()))?;
            }
            (None, None) => {
                writer.copy(name)?;
            }
        }
        progress.advance(1);
    }
    progress.at("write", "");
    let bytes = writer.seal_plain()?;
    cancel.check()?;
    writer.commit()?;
    Ok(FoldReport {
        recipe: recipe.clone(),
        modules: targets.len(),
        whole_tensors: whole.len(),
        bytes,
        seconds: started.elapsed().as_secs_f64(),
        peak_memory_bytes: peak_memory_bytes(),
    })
}

/// The head of a checkpoint whose embedding is the head as well.
fn tied_head(checkpoint: &Checkpoint) -> Option<&'static str> {
    match DecoderSpec::of(checkpoint) {
        Ok(spec) => spec.tied_head.then_some(spec.family.head),
        // Of other models it is not known how they are tied where the config is silent.
        Err(_) => {
            let flag = checkpoint.config().get("tie_word_embeddings").and_then(serde_json::Value::as_bool);
            flag.unwrap_or(!checkpoint.has_linear("lm_head")).then_some("lm_head")
        }
    }
}

/// The name of a tensor of the adapter's model in the checkpoint. Some checkpoints are of the model without the head
/// around it, whose paths lack the first part.
fn name_in(checkpoint: &Checkpoint, path: &str) -> Option<String> {
    let bare = path.split_once('.').map_or("", |(_, rest)| rest);
    [path, bare].into_iter().find(|name| checkpoint.tensor(name).is_some()).map(str::to_string)
}

/// The tensors that the adapter holds whole, by those whose place they take.
fn whole_tensors<'a>(checkpoint: &Checkpoint, adapter: &'a AdapterFolder) -> Result<BTreeMap<String, &'a WholeTensor>> {
    let invalid = |message: &str, tensor: &WholeTensor, hint: &str| {
        Error::new(ErrorCode::AdapterInvalid, message).subject(&tensor.name).hint(hint)
    };
    let spec = DecoderSpec::of(checkpoint).ok();
    let tied = tied_head(checkpoint);
    let mut found = BTreeMap::new();
    for tensor in adapter.whole_tensors() {
        let embedding = spec.as_ref().map_or("embed_tokens", |spec| spec.family.embedding);
        let of = |module: &str| format!(".{}", tensor.name).ends_with(&format!(".{module}.weight"));
        if tied.is_some_and(|head| of(head) || of(embedding)) {
            let message = "embedding and output head are one weight, and the adapter holds one of them whole";
            return Err(invalid(message, tensor, "Give the base model a head of its own first"));
        }
        let name = name_in(checkpoint, &tensor.name).ok_or_else(|| {
            let message = "the checkpoint has no such tensor, which the adapter holds whole";
            invalid(message, tensor, "Use an adapter that was made for this base model")
        })?;
        if let Some(of_base) = checkpoint.tensor(&name).filter(|of_base| of_base.shape != tensor.shape) {
            let message =
                format!("the adapter holds the tensor as {:?}, the base as {:?}", tensor.shape, of_base.shape);
            return Err(invalid(&message, tensor, "An adapter with more tokens needs a base model with as many"));
        }
        found.insert(name, tensor);
    }
    Ok(found)
}

/// The modules of the adapter by the tensors that they change.
fn targets<'a>(checkpoint: &Checkpoint, adapter: &'a AdapterFolder) -> Result<BTreeMap<String, &'a AdapterModule>> {
    let invalid = |message: &str, module: &AdapterModule| {
        Error::new(ErrorCode::AdapterInvalid, message)
            .subject(&module.name)
            .hint("Use an adapter that was made for this base model")
    };
    let tied = tied_head(checkpoint);
    let mut targets = BTreeMap::new();
    for module in adapter.modules() {
        let name = name_in(checkpoint, &format!("{}.weight", module.name))
            .ok_or_else(|| invalid("the checkpoint has no such module", module))?;
        let turned = adapter.fan_in_fan_out() || module.kind == ModuleKind::Embedding;
        let shape = match turned {
            true => [module.in_features, module.out_features],
            false => [module.out_features, module.in_features],
        };
        if checkpoint.tensor(&name).is_some_and(|tensor| tensor.shape != shape) {
            return Err(invalid(&format!("the adapter changes a weight of shape {shape:?}, it has another"), module));
        }
        // Whichever of the two the adapter changes, the other is the same tensor.
        if tied.is_some_and(|head| module.kind == ModuleKind::Embedding || name == format!("{head}.weight")) {
            return Err(invalid(
                "embedding and output head are one weight, and the adapter changes one of them",
                module,
            )
            .hint("Keep the adapter beside the model"));
        }
        targets.insert(name, module);
    }
    Ok(targets)
}

/// The update of a tensor by its rows: `left · right` with `left [rows, rank]`, `right [rank, columns]`.
struct RowUpdate {
    rank: usize,
    columns: usize,
    left: Vec<f64>,
    right: Vec<f64>,
}

impl RowUpdate {
    fn new(adapter: &AdapterFolder, module: &AdapterModule, weight: f64) -> Result<Self> {
        let factors: LowRank = adapter.factors(&module.name)?;
        let (rank, coefficient) = (factors.rank(), weight * module.scaling);
        let wide = |values: &[f32]| -> Vec<f64> { values.iter().map(|&value| f64::from(value)).collect() };
        let turn = |values: Vec<f64>, rows: usize, columns: usize| -> Vec<f64> {
            (0..columns).flat_map(|j| (0..rows).map(move |i| (i, j))).map(|(i, j)| values[i * columns + j]).collect()
        };
        let (out_features, in_features) = (factors.out_features(), factors.in_features());
        let scaled = |values: Vec<f64>| -> Vec<f64> { values.into_iter().map(|value| value * coefficient).collect() };
        Ok(if adapter.fan_in_fan_out() || module.kind == ModuleKind::Embedding {
            // The tensor is the transpose: Aᵀ Bᵀ.
            let left = scaled(turn(wide(factors.a()), rank, in_features));
            RowUpdate { rank, columns: out_features, left, right: turn(wide(factors.b()), out_features, rank) }
        } else {
            RowUpdate { rank, columns: in_features, left: scaled(wide(factors.b())), right: wide(factors.a()) }
        })
    }

    /// Adds the rows from `first` on to `band`.
    fn add(&self, first: usize, band: &mut [f32], pool: &ThreadPool) {
        let rows = band.len() / self.columns;
        let mut update = vec![0.0; band.len()];
        let left = MatrixView::new(&self.left[first * self.rank..(first + rows) * self.rank], rows, self.rank);
        product(left, MatrixView::new(&self.right, self.rank, self.columns), &mut update, pool);
        band.iter_mut().zip(&update).for_each(|(value, update)| *value = (f64::from(*value) + update) as f32);
    }
}
