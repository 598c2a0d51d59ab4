//! A checkpoint as a GGUF file.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use kintsugi_runtime::{CancelToken, Error, ErrorCode, Progress, Result};
use kintsugi_weights::WeightMatrix;
use serde_json::{Map, Value};

use super::block_decoder::decode;
use super::block_encoder::{encode, encode_vector, exact_type, row_bytes};
use super::block_format::BlockContent;
use super::gguf_config::{metadata_of, set_identity, set_rotary_scaling};
use super::gguf_writer::{GgufEntry, GgufWriter};
use super::names::{BlockModule, GgufArchitecture, RowOrder};
use super::vocabulary_writer::set_vocabulary;
use super::{GgufFile, GgufMetadata, GgufType, GgufValue};
use crate::Checkpoint;
use crate::safetensors_file::wrong_shape;

/// Raw bytes are copied in pieces of this size.
const COPY_BYTES: u64 = 4 << 20;

/// In which types a checkpoint is written as GGUF. Vectors, routers and learned positions are always F32.
#[derive(Clone, Debug)]
pub struct GgufPlan {
    /// What the model is called where its configuration does not say; `None` for the name of the source's folder.
    pub name: Option<String>,
    /// The type of the Linears in the blocks. Where rows are no whole blocks of it, `Q8_0` takes its place, or F16.
    pub linears: &'static GgufType,
    /// The type of the embedding and of the head.
    pub embeddings: &'static GgufType,
    /// Whether matrices that are stored in codes stay exactly what they are: in the type that they have in a GGUF file,
    /// or in the smallest type that holds their codes. Those that none holds are rounded to `linears`, and named in
    /// [`GgufSummary::rounded`].
    pub keep_codes: bool,
    /// Whether those that take more bits than the type planned for them are rounded to it all the same.
    pub narrow: bool,
}

/// What was written.
#[derive(Clone, Debug, Default)]
pub struct GgufSummary {
    /// Length of the file.
    pub bytes: u64,
    /// Number of tensors of each type.
    pub types: BTreeMap<&'static str, usize>,
    /// Matrices of the source that were stored in codes and are not in the same ones now.
    pub rounded: Vec<String>,
    /// What the file does not say of the source, as sentences for the user.
    pub notices: Vec<String>,
}

impl GgufPlan {
    /// All matrices in `main`, but the embedding and the head in a type of more bits where `main` has few, as
    /// llama.cpp does.
    pub fn new(main: &'static GgufType) -> Self {
        let finer = match main.name {
            "Q4_0" | "Q4_1" | "Q4_K" => GgufType::written("Q6_K").unwrap_or(main),
            _ => main,
        };
        GgufPlan { name: None, linears: main, embeddings: finer, keep_codes: true, narrow: false }
    }

    /// Whether codes that `exact` holds stay in it where `planned` is planned.
    fn keeps(&self, exact: &GgufType, planned: &GgufType) -> bool {
        let wider = exact.block_bytes * planned.block_elements > planned.block_bytes * exact.block_elements;
        exact == planned || (self.keep_codes && !(self.narrow && wider))
    }
}

/// A tensor that will be written, and where its bytes come from.
struct Planned {
    entry: GgufEntry,
    origin: Origin,
}

enum Origin {
    /// A vector of the source, plus one where norms are kept so.
    Vector { name: String, added: f32, order: RowOrder, heads: usize },
    /// A matrix of the source.
    Matrix { name: String, order: RowOrder, heads: usize, transposed: bool },
    /// The same matrix of each expert.
    Experts(Vec<String>),
    /// Values that no tensor of the source holds.
    Values(Vec<f32>),
    /// A tensor of a GGUF file, in its own order of rows.
    Stored { name: String },
}

/// Writes `source`, a folder or a GGUF file, as the GGUF file `destination`, matrix by matrix: no more than one of
/// them is in memory, or the experts of one block.
///
/// # Errors
/// `ERR_CONFIG_ARCHITECTURE` for an architecture without a name in GGUF, `ERR_CONFIG_UNSUPPORTED` for a feature or a
/// tensor that the file cannot say, `ERR_TOKENIZER_INVALID`; what reading the source reports;
/// `ERR_OUTPUT_NOT_EMPTY`, `ERR_OUTPUT_UNWRITABLE`; `ERR_CANCELLED`. Nothing stays then.
pub fn write_gguf(
    source: &Checkpoint,
    plan: &GgufPlan,
    destination: &Path,
    cancel: &CancelToken,
    progress: &Progress,
) -> Result<GgufSummary> {
    let mut summary = GgufSummary::default();
    progress.begin("plan", 0);
    let (mut metadata, planned) = match source.gguf() {
        Some(tensors) => plan_gguf(tensors.file(), plan, &mut summary)?,
        None => plan_folder(source, plan, &mut summary, cancel)?,
    };
    let entries: Vec<GgufEntry> = planned.iter().map(|planned| planned.entry.clone()).collect();
    metadata.set("general.file_type", GgufValue::U32(file_type(main_type(&entries).unwrap_or(plan.linears))));
    for entry in &entries {
        *summary.types.entry(entry.gguf_type.name).or_default() += 1;
    }
    progress.begin("write", planned.len() as u64);
    let mut writer = GgufWriter::create(destination, &metadata, &entries)?;
    for Planned { entry, origin } in &planned {
        cancel.check()?;
        progress.at("write", entry.name.clone());
        write_tensor(source, entry, origin, &mut writer).map_err(|error| match error.subject.is_empty() {
            true => error.subject(&entry.name),
            false => error,
        })?;
        progress.advance(1);
    }
    summary.bytes = writer.finish()?;
    Ok(summary)
}

/// Refuses what a GGUF file of `source` cannot say, and gives what it leaves out, as sentences for the user; nothing is
/// written.
///
/// # Errors
/// Those of [`write_gguf`] that come before its first byte.
pub fn check_gguf(source: &Checkpoint, plan: &GgufPlan) -> Result<Vec<String>> {
    let mut summary = GgufSummary::default();
    match source.gguf() {
        Some(tensors) => plan_gguf(tensors.file(), plan, &mut summary)?,
        None => plan_folder(source, plan, &mut summary, &CancelToken::new())?,
    };
    Ok(summary.notices)
}

/// The type of most matrices in the blocks.
fn main_type(entries: &[GgufEntry]) -> Option<&'static GgufType> {
    let mut counts: BTreeMap<u32, usize> = BTreeMap::new();
    for entry in entries.iter().filter(|entry| entry.shape.len() > 1 && entry.name.starts_with("blk.")) {
        *counts.entry(entry.gguf_type.id).or_default() += 1;
    }
    let (&id, _) = counts.iter().max_by_key(|&(_, count)| count)?;
    GgufType::by_id(id)
}

/// What `general.file_type` calls a file whose matrices are mostly of that type.
fn file_type(main: &GgufType) -> u32 {
    match main.name {
        "F32" => 0,
        "Q4_0" => 2,
        "Q4_1" => 3,
        "Q8_0" => 7,
        "Q4_K" => 15,
        "Q6_K" => 18,
        "BF16" => 32,
        _ => 1,
    }
}

/// The wanted type, or the next one whose blocks the rows consist of.
fn fitting(wanted: &'static GgufType, columns: usize) -> &'static GgufType {
    let eight = GgufType::written("Q8_0");
    let half = GgufType::written("F16");
    let choices = [Some(wanted), eight.ok(), half.ok()];
    choices.into_iter().flatten().find(|choice| row_bytes(choice, columns).is_some()).unwrap_or(wanted)
}

/// A GGUF file keeps its metadata, its names and the order of its rows.
fn plan_gguf(file: &GgufFile, plan: &GgufPlan, summary: &mut GgufSummary) -> Result<(GgufMetadata, Vec<Planned>)> {
    let mut planned = Vec::new();
    for (name, tensor) in file.tensors() {
        let columns = tensor.shape.last().copied().unwrap_or(0);
        let is_codes = matches!(tensor.gguf_type.content, BlockContent::Codes(_));
        let small = tensor.shape.len() == 1 || name.contains("ffn_gate_inp") || name.starts_with("position_embd");
        let outside = name == "token_embd.weight" || name == "output.weight";
        let wanted = if outside { plan.embeddings } else { plan.linears };
        let planned_type = fitting(wanted, columns);
        let keeps = is_codes && plan.keeps(tensor.gguf_type, planned_type);
        let gguf_type = if small || keeps { tensor.gguf_type } else { planned_type };
        if is_codes && gguf_type != tensor.gguf_type {
            summary.rounded.push(name.clone());
        }
        let entry = GgufEntry { name: name.clone(), gguf_type, shape: tensor.shape.clone() };
        planned.push(Planned { entry, origin: Origin::Stored { name: name.clone() } });
    }
    Ok((file.metadata().clone(), planned))
}

/// The plan of a folder while it is made.
struct FolderPlan<'a> {
    source: &'a Checkpoint,
    architecture: &'static GgufArchitecture,
    plan: &'a GgufPlan,
    summary: &'a mut GgufSummary,
    planned: Vec<Planned>,
    /// Tensors of the source that have a place in the file, or need none.
    used: BTreeSet<String>,
    heads: usize,
    kv_heads: usize,
}

fn plan_folder(
    source: &Checkpoint,
    plan: &GgufPlan,
    summary: &mut GgufSummary,
    cancel: &CancelToken,
) -> Result<(GgufMetadata, Vec<Planned>)> {
    let config = source.config();
    let subject = source.path().display().to_string();
    let class = config.get("architectures").and_then(|names| names.get(0)).and_then(Value::as_str).unwrap_or_default();
    let architecture = GgufArchitecture::of_family(class, &subject)?;
    check_activation(config, architecture)?;
    let mut metadata = metadata_of(config, architecture)?;
    // The destination may have a name for the time of writing, and the same model must give the same bytes.
    let folder = source.path().canonicalize().unwrap_or_else(|_| source.path().to_path_buf());
    let name = plan.name.as_deref().map(Into::into).unwrap_or(folder.file_name().unwrap_or_default().to_string_lossy());
    set_identity(&mut metadata, config, &name);
    let divisors = set_rotary_scaling(config, architecture, &mut metadata)?;
    let size = |suffix: &str| metadata.unsigned(&format!("{}.{suffix}", architecture.name));
    let heads = size("attention.head_count")?.unwrap_or(0) as usize;
    let kv_heads = size("attention.head_count_kv")?.unwrap_or(heads as u64) as usize;
    let blocks = size("block_count")?.unwrap_or(0);
    let experts = size("expert_count")?.unwrap_or(0);
    let mut making =
        FolderPlan { source, architecture, plan, summary, planned: Vec::new(), used: BTreeSet::new(), heads, kv_heads };
    making.notice_what_stays(config)?;
    let vocabulary = making.add_embedding(config)?;
    for (gguf, values) in [("rope_freqs", &divisors.short), ("rope_factors_long", &divisors.long)] {
        let Some(values) = values else { continue };
        let gguf = if divisors.long.is_some() && gguf == "rope_freqs" { "rope_factors_short" } else { gguf };
        making.push(&format!("{gguf}.weight"), "F32", vec![values.len()], Origin::Values(values.clone()))?;
    }
    for block in 0..blocks {
        cancel.check()?;
        for module in architecture.inside {
            making.add_module(block, module, experts)?;
        }
    }
    for &(gguf, hugging_face) in architecture.outside {
        let tied = gguf == "output" && making.is_tied(config);
        if gguf != "token_embd" && !tied {
            making.add_plain(gguf, hugging_face, RowOrder::Same)?;
        }
    }
    making.refuse_unused(config)?;
    let planned = making.planned;
    metadata.set(format!("{}.vocab_size", architecture.name), GgufValue::U32(vocabulary as u32));
    let tokenizer: Value = serde_json::from_slice(&source.tokenizer_json()?).map_err(|error| {
        Error::new(ErrorCode::TokenizerInvalid, format!("tokenizer.json is not JSON: {error}"))
            .subject(source.tokenizer_name())
            .hint("The file is damaged; download it again")
    })?;
    let notice = set_vocabulary(&mut metadata, &tokenizer, config, vocabulary, &source.tokenizer_name())?;
    summary.notices.extend(notice);
    if let Some(template) = source.chat_template()? {
        metadata.set_text("tokenizer.chat_template", template);
    }
    Ok((metadata, planned))
}

/// GGUF does not say what the MLP computes: each architecture has one activation.
fn check_activation(config: &Map<String, Value>, architecture: &GgufArchitecture) -> Result<()> {
    for &(field, expected) in architecture.activations {
        let Some(found) = config.get(field).and_then(Value::as_str) else { continue };
        if !expected.contains(&found) {
            let message = format!("{} models of GGUF compute {}, this one {found}", architecture.name, expected[0]);
            return Err(Error::new(ErrorCode::ConfigUnsupported, message)
                .subject(field)
                .hint("The file would compute something else; keep the model in the layout of Hugging Face"));
        }
        return Ok(());
    }
    Ok(())
}

impl FolderPlan<'_> {
    fn notice_what_stays(&mut self, config: &Map<String, Value>) -> Result<()> {
        let window = config.get("sliding_window").is_some_and(|window| !window.is_null());
        let used = config.get("use_sliding_window").and_then(Value::as_bool).unwrap_or(true);
        if window && used && matches!(self.architecture.name, "llama" | "qwen2" | "qwen3" | "phi3") {
            let notice = "llama.cpp does not compute the sliding window of this model: it attends to all positions";
            self.summary.notices.push(notice.into());
        }
        if self.source.compensation()?.is_some() {
            let notice = "the compensation in eora/ is not written: GGUF holds no low-rank factors beside matrices";
            self.summary.notices.push(notice.into());
        }
        Ok(())
    }

    /// Whether the head is the embedding.
    fn is_tied(&self, config: &Map<String, Value>) -> bool {
        let default = matches!(self.architecture.name, "gemma2" | "gemma3" | "gpt2");
        config.get("tie_word_embeddings").and_then(Value::as_bool).unwrap_or(default)
    }

    /// Gives the rows of the embedding.
    fn add_embedding(&mut self, config: &Map<String, Value>) -> Result<usize> {
        let outside = |gguf: &str| self.architecture.outside.iter().find(|(known, _)| *known == gguf).map(|(_, n)| *n);
        let (Some(embedding), Some(head)) = (outside("token_embd"), outside("output")) else {
            return Err(Error::new(ErrorCode::Internal, "an architecture without embedding"));
        };
        let stored = self.stored_name(embedding);
        if self.is_tied(config) {
            self.used.insert(format!("{head}.weight"));
            if !self.source.has_linear(&stored) && self.source.has_linear(head) {
                self.add_matrix("token_embd", head, RowOrder::Same)?;
                return Ok(self.source.linear_shape(head)?.0);
            }
        }
        self.add_matrix("token_embd", &stored, RowOrder::Same)?;
        Ok(self.source.linear_shape(&stored)?.0)
    }

    /// The name that the checkpoint has: some GPT-2 leave out the first part.
    fn stored_name(&self, name: &str) -> String {
        let there = |name: &str| self.source.tensors().any(|tensor| tensor.name.starts_with(&format!("{name}.")));
        match name.strip_prefix("transformer.") {
            Some(bare) if !there(name) && there(bare) => bare.to_owned(),
            _ => name.to_owned(),
        }
    }

    fn add_module(&mut self, block: u64, module: &BlockModule, experts: u64) -> Result<()> {
        let gguf = format!("blk.{block}.{}", module.gguf);
        let prefix = format!("{}.{block}", self.architecture.blocks);
        let name = format!("{prefix}.{}", module.hugging_face);
        if module.rows != RowOrder::Experts {
            return self.add_plain(&gguf, &name, module.rows);
        }
        let names: Vec<String> = (0..experts).map(|expert| name.replace("{}", &expert.to_string())).collect();
        let Some(first) = names.first().filter(|first| self.source.has_linear(first)) else { return Ok(()) };
        let (rows, columns) = self.source.linear_shape(first)?;
        let gguf_type = fitting(self.plan.linears, columns);
        for name in &names {
            self.use_linear(name);
            if self.source.linear_shape(name)? != (rows, columns) {
                let (rows, columns) = self.source.linear_shape(name)?;
                return Err(wrong_shape(name, &[rows, columns], "that of the first expert"));
            }
        }
        if self.source.quantization().is_some() {
            self.summary.rounded.extend(names.iter().cloned());
        }
        let shape = vec![names.len(), rows, columns];
        self.push(&format!("{gguf}.weight"), gguf_type.name, shape, Origin::Experts(names))
    }

    /// A module with a matrix or a vector, where the source has it.
    fn add_plain(&mut self, gguf: &str, name: &str, order: RowOrder) -> Result<()> {
        let name = self.stored_name(name);
        let weight = format!("{name}.weight");
        match self.source.tensor(&weight).map(|tensor| tensor.shape.len()) {
            Some(1) => self.add_vector(&format!("{gguf}.weight"), &weight, RowOrder::Same)?,
            _ if self.source.has_linear(&name) => self.add_matrix(gguf, &name, order)?,
            _ => {}
        }
        let (bias, gguf_bias) = (format!("{name}.bias"), format!("{gguf}.bias"));
        if self.source.tensor(&bias).is_some() {
            if gguf.ends_with("attn_output") && self.architecture.name.starts_with("qwen") {
                let message = format!("{} models of GGUF have no such bias", self.architecture.name);
                return Err(Error::new(ErrorCode::ConfigUnsupported, message)
                    .subject(bias)
                    .hint("llama.cpp would not load the file; keep the model in the layout of Hugging Face"));
            }
            return self.add_vector(&gguf_bias, &bias, order);
        }
        let rows = self.planned.last().map_or(0, |planned| planned.entry.shape[0]);
        if self.architecture.needs_biases && gguf.starts_with("blk.") {
            return self.push(&gguf_bias, "F32", vec![rows], Origin::Values(vec![0.0; rows]));
        }
        Ok(())
    }

    fn add_vector(&mut self, gguf: &str, name: &str, order: RowOrder) -> Result<()> {
        let shape = self.source.tensor(name).map(|tensor| tensor.shape.clone()).unwrap_or_default();
        let &[length] = shape.as_slice() else { return Err(wrong_shape(name, &shape, "[length]")) };
        self.used.insert(name.to_owned());
        let heads = self.heads_of(order);
        if !order.fits(length, heads) {
            return Err(wrong_shape(name, &[length], &format!("rows in pairs over {heads} heads")));
        }
        let added = if self.architecture.shifted_norms && gguf.ends_with(".weight") { 1.0 } else { 0.0 };
        self.push(gguf, "F32", vec![length], Origin::Vector { name: name.to_owned(), added, order, heads })
    }

    fn add_matrix(&mut self, gguf: &str, name: &str, order: RowOrder) -> Result<()> {
        let (mut rows, mut columns) = self.source.linear_shape(name)?;
        let is_plain = self.source.tensor(&format!("{name}.weight")).is_some() && !self.source.is_quantized(name);
        let transposed = self.architecture.transposed && gguf.starts_with("blk.") && is_plain;
        if transposed {
            (rows, columns) = (columns, rows);
        }
        self.use_linear(name);
        let heads = self.heads_of(order);
        if !order.fits(rows, heads) {
            return Err(wrong_shape(name, &[rows, columns], &format!("rows in pairs over {heads} heads")));
        }
        let origin = Origin::Matrix { name: name.to_owned(), order, heads, transposed };
        let gguf_name = format!("{gguf}.weight");
        if gguf == "position_embd" || gguf.ends_with("ffn_gate_inp") {
            return self.push(&gguf_name, "F32", vec![rows, columns], origin);
        }
        if gguf.ends_with("ffn_gate_inp_shexp") {
            return self.push(&gguf_name, "F32", vec![columns], origin);
        }
        let wanted = if gguf.starts_with("blk.") { self.plan.linears } else { self.plan.embeddings };
        let mut gguf_type = fitting(wanted, columns);
        if self.source.quantization().is_some()
            && let WeightMatrix::Quantized(codes) = self.source.linear(name)?.matrix
        {
            match exact_type(&codes).filter(|exact| self.plan.keeps(exact, gguf_type)) {
                Some(exact) => gguf_type = exact,
                None => self.summary.rounded.push(name.to_owned()),
            }
        }
        self.push(&gguf_name, gguf_type.name, vec![rows, columns], origin)
    }

    fn push(&mut self, name: &str, type_name: &str, shape: Vec<usize>, origin: Origin) -> Result<()> {
        let entry = GgufEntry { name: name.to_owned(), gguf_type: GgufType::written(type_name)?, shape };
        self.planned.push(Planned { entry, origin });
        Ok(())
    }

    fn heads_of(&self, order: RowOrder) -> usize {
        if order == RowOrder::KeyPairs { self.kv_heads } else { self.heads }
    }

    fn use_linear(&mut self, name: &str) {
        let parts: Vec<String> = self.source.parts_of(name).map(|tensor| tensor.name.clone()).collect();
        self.used.extend(parts);
    }

    /// A tensor without a place would be missing in the computation. Tables that readers compute themselves are not
    /// needed.
    fn refuse_unused(&self, config: &Map<String, Value>) -> Result<()> {
        const COMPUTED: &[&str] =
            &["rotary_emb.inv_freq", "attn.bias", "attn.masked_bias", "attention.bias", "attention.masked_bias"];
        let needless = |name: &str| COMPUTED.iter().any(|end| name.ends_with(end));
        let unused = self.source.tensors().find(|tensor| !self.used.contains(&tensor.name) && !needless(&tensor.name));
        let Some(tensor) = unused else { return Ok(()) };
        let kind = config.get("model_type").and_then(Value::as_str).unwrap_or_default();
        Err(Error::new(ErrorCode::ConfigUnsupported, format!("GGUF has no place for this tensor of a '{kind}' model"))
            .subject(&tensor.name)
            .hint("The file would compute something else; keep the model in the layout of Hugging Face"))
    }
}

fn write_tensor(source: &Checkpoint, entry: &GgufEntry, origin: &Origin, writer: &mut GgufWriter) -> Result<()> {
    match origin {
        Origin::Values(values) => writer.write(&encode_vector(values)),
        Origin::Vector { name, added, order, heads } => {
            let values = source.vector(name)?;
            let mut stored = values.clone();
            for (row, value) in values.iter().enumerate() {
                stored[order.stored_row(row, values.len(), *heads)] = value + added;
            }
            writer.write(&encode_vector(&stored))
        }
        Origin::Matrix { name, order, heads, transposed } => {
            let matrix = if *transposed {
                WeightMatrix::Dense(source.dense(&format!("{name}.weight"))?.transposed())
            } else {
                source.linear(name)?.matrix
            };
            let mut rows: Vec<usize> = (0..matrix.rows()).collect();
            for row in 0..matrix.rows() {
                rows[order.stored_row(row, matrix.rows(), *heads)] = row;
            }
            writer.write(&encode(&matrix, entry.gguf_type, |row| rows[row])?)
        }
        Origin::Experts(names) => {
            let mut bytes = Vec::new();
            for name in names {
                bytes.extend(encode(&source.linear(name)?.matrix, entry.gguf_type, |row| row)?);
            }
            writer.write(&bytes)
        }
        Origin::Stored { name } => write_stored(source, entry, name, writer),
    }
}

fn write_stored(source: &Checkpoint, entry: &GgufEntry, name: &str, writer: &mut GgufWriter) -> Result<()> {
    let file = source.gguf().map(super::GgufTensors::file);
    let Some((file, tensor)) = file.and_then(|file| Some((file, file.tensor(name)?))) else {
        return Err(Error::new(ErrorCode::Internal, "a tensor without a place").subject(name));
    };
    if tensor.gguf_type != entry.gguf_type {
        let columns = tensor.shape.last().copied().unwrap_or(0);
        let rows = tensor.shape.iter().rev().skip(1).product();
        let bytes = file.read_part(tensor, 0, tensor.bytes as usize)?;
        let matrix = decode(name, tensor.gguf_type, rows, columns, &bytes)?;
        return writer.write(&encode(&matrix, entry.gguf_type, |row| row)?);
    }
    let mut written = 0;
    while written < tensor.bytes {
        let count = COPY_BYTES.min(tensor.bytes - written);
        writer.write(&file.read_part(tensor, written, count as usize)?)?;
        written += count;
    }
    Ok(())
}
