use std::collections::BTreeMap;
use std::path::Path;

use kintsugi_checkpoint::gguf::{BlockContent, BlockGrid, GgufType};
use kintsugi_checkpoint::{Checkpoint, TensorInfo};
use kintsugi_model::{DecoderSpec, read_tokenizer};
use kintsugi_runtime::{Error, ErrorCode, Result};
use kintsugi_weights::{Adapter, LowRank};
use serde::Serialize;

use crate::eora_unit::EoraUnit;

/// What a checkpoint is and what can be done with it, from its headers.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Inspection {
    /// Folder.
    pub path: String,
    /// `architectures[0]` of `config.json`; `null` when it names none.
    pub architecture: Option<String>,
    /// Weights of the original model that the tensors stand for; `null` when the architecture does not run here.
    pub parameters: Option<u64>,
    /// Number of tensors.
    pub tensors: usize,
    /// Bytes of all tensors.
    pub bytes: u64,
    /// Bytes by element type.
    pub dtypes: BTreeMap<String, u64>,
    /// Number of Linears in the blocks.
    pub linears: Option<usize>,
    /// How the Linears are compressed; `null` when they are dense.
    pub quantization: Option<InspectedQuantization>,
    /// Bits of everything that belongs to the Linears of the blocks, over their number of weights.
    pub bits_per_weight: Option<f64>,
    /// The compensation beside the checkpoint.
    pub compensation: Option<InspectedCompensation>,
    /// Sizes of the decoder.
    pub spec: Option<InspectedSpec>,
    /// Whether `compress` takes it.
    pub can_compress: bool,
    /// Whether `loadModel` takes it.
    pub can_run: bool,
    /// Why not.
    pub reason: Option<String>,
    /// What the folder says wrongly and was read otherwise, as sentences.
    pub notices: Vec<String>,
}

/// How the Linears of a checkpoint are compressed.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct InspectedQuantization {
    /// Name of the file format.
    pub format: &'static str,
    /// Width of a code.
    pub bits: u8,
    /// Columns per group; `null` for the whole row.
    pub group_size: Option<usize>,
    /// Without zero points.
    pub symmetric: bool,
}

/// Factors beside a checkpoint.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct InspectedCompensation {
    /// Linears that have factors.
    pub linears: usize,
    /// Smallest rank.
    pub smallest_rank: usize,
    /// Largest rank.
    pub largest_rank: usize,
}

/// Sizes of a decoder.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct InspectedSpec {
    /// Blocks.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Rows of the embedding.
    pub vocabulary_size: usize,
    /// Longest context.
    pub context_length: usize,
    /// Whether the head is the embedding.
    pub tied_head: bool,
}

/// Bits of the factors in memory, where Linears of one input keep an A that they share once.
fn factor_bits(spec: &DecoderSpec, compensation: &Option<Adapter>) -> u64 {
    let Some(adapter) = compensation else { return 0 };
    let mut bits: u64 = adapter.linears.values().map(|entry| entry.factors.stored_bits()).sum();
    let units = EoraUnit::of_block(spec, true);
    for block in 0..spec.layers {
        for unit in &units {
            let of_place = |&place: &usize| adapter.linears.get(&spec.linear_name(block, &spec.linears[place]));
            let factors: Vec<&LowRank> = unit.places.iter().filter_map(of_place).map(|entry| &entry.factors).collect();
            let again = (1..factors.len()).filter(|&at| factors[..at].iter().any(|other| other.a() == factors[at].a()));
            bits -= again.map(|at| factors[at].projection_bits()).sum::<u64>();
        }
    }
    bits
}

/// Opens a checkpoint folder and says what it is.
///
/// An architecture that does not run here is an answer, not an error.
///
/// # Errors
/// What opening the folder reports.
pub fn inspect(path: &Path) -> Result<Inspection> {
    let checkpoint = Checkpoint::open(path)?;
    let spec = DecoderSpec::of(&checkpoint);
    let mut dtypes = BTreeMap::new();
    let mut bytes = 0;
    let mut tensors = 0;
    for tensor in checkpoint.tensors() {
        *dtypes.entry(tensor.dtype.to_lowercase()).or_insert(0) += tensor.bytes;
        bytes += tensor.bytes;
        tensors += 1;
    }
    let compensation = checkpoint.compensation()?;
    let ranks: Vec<usize> =
        compensation.iter().flat_map(|adapter| adapter.linears.values()).map(|entry| entry.factors.rank()).collect();
    let linear_bytes = spec.as_ref().ok().map(|spec| linear_bytes(&checkpoint, spec));
    let runnable = match &spec {
        Ok(spec) => runs(&checkpoint, spec),
        Err(error) => Err(error.clone()),
    };
    let of_blocks = || checkpoint.block_type().and_then(inspected_blocks);
    let quantization = checkpoint.quantization().map(|config| InspectedQuantization {
        format: config.format.name(),
        bits: config.bits,
        group_size: match config.group_size {
            kintsugi_weights::GroupSize::Columns(columns) => Some(columns),
            kintsugi_weights::GroupSize::WholeRow => None,
        },
        symmetric: config.symmetric,
    });
    let quantization = quantization.or_else(of_blocks);
    let spec = spec.ok();
    let can_compress = runnable.is_ok() && quantization.is_none();
    let reason = match &runnable {
        Err(error) => Some(error.message.clone()),
        Ok(()) if quantization.is_some() => Some("it is compressed already, so compress does not take it".to_owned()),
        Ok(()) => None,
    };
    Ok(Inspection {
        path: path.display().to_string(),
        architecture: checkpoint
            .config()
            .get("architectures")
            .and_then(|names| names.get(0))
            .and_then(|name| name.as_str())
            .map(str::to_owned),
        parameters: spec.as_ref().map(DecoderSpec::parameters),
        tensors,
        bytes,
        dtypes,
        linears: spec.as_ref().map(|spec| spec.layers * spec.linears.len()),
        quantization,
        bits_per_weight: spec.as_ref().zip(linear_bytes).map(|(spec, bytes)| {
            (bytes * 8 + factor_bits(spec, &compensation)) as f64 / spec.linear_parameters() as f64
        }),
        compensation: ranks.iter().min().zip(ranks.iter().max()).map(|(&smallest_rank, &largest_rank)| {
            InspectedCompensation { linears: ranks.len(), smallest_rank, largest_rank }
        }),
        can_run: runnable.is_ok(),
        can_compress,
        reason,
        notices: checkpoint.notices().to_vec(),
        spec: spec.map(|spec| InspectedSpec {
            layers: spec.layers,
            hidden_size: spec.hidden_size,
            intermediate_size: spec.intermediate_size,
            heads: spec.heads,
            kv_heads: spec.kv_heads,
            head_dim: spec.head_dim,
            vocabulary_size: spec.vocabulary_size,
            context_length: spec.context_length,
            tied_head: spec.tied_head,
        }),
    })
}

/// What the type of most weights of a GGUF file is; the others are told by the bytes of each type.
fn inspected_blocks(main: &GgufType) -> Option<InspectedQuantization> {
    let BlockContent::Codes(codes) = main.content else { return None };
    let symmetric = matches!(codes.grid, BlockGrid::Centered);
    Some(InspectedQuantization { format: "gguf", bits: codes.bits, group_size: Some(codes.group), symmetric })
}

/// Bytes of the codes, scales, zero points and dense weights of the Linears of the blocks.
fn linear_bytes(checkpoint: &Checkpoint, spec: &DecoderSpec) -> u64 {
    let names =
        (0..spec.layers).flat_map(|block| spec.linears.iter().map(move |linear| spec.linear_name(block, linear)));
    let weighs = |tensor: &&TensorInfo| !tensor.name.ends_with(".weight_shape");
    names.map(|name| checkpoint.parts_of(&name).filter(weighs).map(|tensor| tensor.bytes).sum::<u64>()).sum()
}

/// Whether the tokenizer and every Linear are there, by their headers.
fn runs(checkpoint: &Checkpoint, spec: &DecoderSpec) -> Result<()> {
    read_tokenizer(checkpoint, spec)?;
    for block in 0..spec.layers {
        for linear in &spec.linears {
            let name = spec.linear_name(block, linear);
            if !checkpoint.has_linear(&name) {
                return Err(Error::new(ErrorCode::CheckpointTensorMissing, format!("{name} has no weight"))
                    .subject(name)
                    .hint("Take config.json from the folder that the weights come from"));
            }
        }
    }
    Ok(())
}
