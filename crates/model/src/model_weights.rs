use kintsugi_checkpoint::Checkpoint;
use kintsugi_runtime::{Error, ErrorCode, Result};
use kintsugi_weights::{Adapter, LinearWeight, LowRank, WeightMatrix};

use crate::{DecoderSpec, Embedding, LinearSpec, NormKind, PositionRule, Tokenizer};

/// The weight of a norm.
#[derive(Clone, Debug, PartialEq)]
pub enum NormWeight {
    /// `weight · x / rms(x)`.
    Rms(Vec<f32>),
    /// `weight · (x − mean(x)) / deviation(x) + bias`.
    Layer {
        /// `[width]`
        weight: Vec<f32>,
        /// `[width]`
        bias: Vec<f32>,
    },
}

/// The weights of one decoder block as they were read.
#[derive(Clone, Debug)]
pub struct BlockWeights {
    /// In the order of [`DecoderSpec::linears`].
    pub linears: Vec<LinearWeight>,
    /// `[hiddenSize]`
    pub attention_norm: NormWeight,
    /// `[hiddenSize]`
    pub mlp_norm: NormWeight,
    /// Of each query head and each key head, `[headDim]`.
    pub head_norms: Option<[NormWeight; 2]>,
    /// Of what the attention and the MLP add, `[hiddenSize]`.
    pub branch_norms: Option<[NormWeight; 2]>,
    /// What chooses experts, `[experts, hiddenSize]`.
    pub router: Option<LinearWeight>,
    /// What weighs the expert that sees every token, `[1, hiddenSize]`.
    pub shared_gate: Option<LinearWeight>,
}

/// The weights outside the blocks.
#[derive(Clone, Debug)]
pub struct ModelWeights {
    /// Of tokens and positions.
    pub embedding: Embedding,
    /// `None` when the head is the embedding.
    pub head: Option<LinearWeight>,
    /// `[hiddenSize]`
    pub final_norm: NormWeight,
}

impl BlockWeights {
    /// Reads block `block` and checks every shape against the specification.
    ///
    /// # Errors
    /// `ERR_CHECKPOINT_TENSOR_MISSING`, `ERR_CHECKPOINT_SHAPE`, and what reading reports.
    pub fn read(checkpoint: &Checkpoint, spec: &DecoderSpec, block: usize) -> Result<Self> {
        let linears = spec.linears.iter().map(|linear| read_linear(checkpoint, spec, block, linear));
        let prefix = spec.block_name(block);
        let norm = |name: &str, width| read_norm(checkpoint, spec, &format!("{prefix}.{name}"), width);
        let chooser = |name: &str, rows| {
            let name = format!("{prefix}.{name}");
            let weight = checkpoint.linear(&name)?;
            check_shape(&name, (rows, spec.hidden_size), (weight.matrix.rows(), weight.matrix.columns()))?;
            Ok(weight)
        };
        let two = |names: Option<[&str; 2]>, width| match names {
            Some([first, second]) => Ok(Some([norm(first, width)?, norm(second, width)?])),
            None => Ok(None),
        };
        Ok(BlockWeights {
            linears: linears.collect::<Result<_>>()?,
            attention_norm: norm(spec.family.attention_norm, spec.hidden_size)?,
            mlp_norm: norm(spec.family.mlp_norm, spec.hidden_size)?,
            head_norms: two(spec.family.head_norms, spec.head_dim)?,
            branch_norms: two(spec.family.branch_norms, spec.hidden_size)?,
            router: match (&spec.experts, spec.family.experts) {
                (Some(experts), Some(rule)) => Some(chooser(rule.router, experts.count)?),
                _ => None,
            },
            shared_gate: match spec.family.experts.and_then(|rule| rule.shared_gate) {
                Some(name) => Some(chooser(name, 1)?),
                None => None,
            },
        })
    }
}

impl Embedding {
    /// Reads the embedding of tokens and that of positions, where positions are learned.
    ///
    /// # Errors
    /// `ERR_CHECKPOINT_TENSOR_MISSING`, `ERR_CHECKPOINT_SHAPE`, and what reading reports.
    pub fn read(checkpoint: &Checkpoint, spec: &DecoderSpec) -> Result<Self> {
        let expected = (spec.vocabulary_size, spec.hidden_size);
        let embedding_name = spec.name(spec.family.embedding);
        let head_name = spec.family.head;
        // A tied matrix may be stored under either name.
        let stored = if spec.tied_head && !checkpoint.has_linear(embedding_name) { head_name } else { embedding_name };
        let tokens = checkpoint.linear(stored)?.matrix;
        check_shape(&format!("{stored}.weight"), expected, (tokens.rows(), tokens.columns()))?;
        let positions = match spec.family.positions {
            PositionRule::Learned(name) => {
                let name = format!("{}.weight", spec.name(name));
                let positions = checkpoint.dense(&name)?;
                let shape = (positions.rows(), positions.columns());
                check_shape(&name, (spec.context_length, spec.hidden_size), shape)?;
                Some(positions)
            }
            PositionRule::Rotary { .. } => None,
        };
        Ok(Embedding { tokens, positions, scale: spec.embedding_scale })
    }
}

impl ModelWeights {
    /// Reads the embedding, the final norm and the head.
    ///
    /// # Errors
    /// `ERR_CHECKPOINT_TENSOR_MISSING`, `ERR_CHECKPOINT_SHAPE`, and what reading reports.
    pub fn read(checkpoint: &Checkpoint, spec: &DecoderSpec) -> Result<Self> {
        let (embedding, head) = (Embedding::read(checkpoint, spec)?, read_head(checkpoint, spec)?);
        let final_norm = read_final_norm(checkpoint, spec)?;
        Ok(ModelWeights { embedding, head, final_norm })
    }

    /// The head as a Linear.
    pub fn head(&self) -> LinearWeight {
        let tied = || LinearWeight::plain(self.embedding.tokens.clone());
        self.head.clone().unwrap_or_else(tied)
    }
}

/// The head; `None` when it is the embedding.
pub(crate) fn read_head(checkpoint: &Checkpoint, spec: &DecoderSpec) -> Result<Option<LinearWeight>> {
    if spec.tied_head {
        return Ok(None);
    }
    let name = spec.family.head;
    let head = checkpoint.linear(name)?;
    let expected = (spec.vocabulary_size, spec.hidden_size);
    check_shape(&format!("{name}.weight"), expected, (head.matrix.rows(), head.matrix.columns()))?;
    Ok(Some(head))
}

/// The norm behind the last block.
pub(crate) fn read_final_norm(checkpoint: &Checkpoint, spec: &DecoderSpec) -> Result<NormWeight> {
    read_norm(checkpoint, spec, spec.name(spec.family.final_norm), spec.hidden_size)
}

/// Reads the tokenizer and checks that it fits the vocabulary.
///
/// # Errors
/// `ERR_TOKENIZER_INVALID`.
pub fn read_tokenizer(checkpoint: &Checkpoint, spec: &DecoderSpec) -> Result<Tokenizer> {
    let subject = checkpoint.tokenizer_name();
    let tokenizer = Tokenizer::from_json(&checkpoint.tokenizer_json()?, &subject)?;
    let (known, rows) = (tokenizer.vocabulary_size(), spec.vocabulary_size);
    if known > rows {
        let message = format!("the tokenizer knows {known} tokens, but the model has {rows}");
        return Err(Error::new(ErrorCode::TokenizerInvalid, message)
            .subject(subject)
            .hint("Take tokenizer.json from the folder that the weights come from"));
    }
    Ok(tokenizer)
}

/// Puts the factors of `adapter` that belong to block `block` beside its weights, with the scaling folded into B, and
/// their biases into those of the Linears.
///
/// # Errors
/// `ERR_ADAPTER_INVALID` when a factor does not have the shape of its Linear.
pub fn attach_compensation(
    spec: &DecoderSpec,
    block: usize,
    weights: &mut BlockWeights,
    adapter: &Adapter,
) -> Result<()> {
    for (linear, weight) in spec.linears.iter().zip(&mut weights.linears) {
        let name = spec.linear_name(block, linear);
        let Some(entry) = adapter.linears.get(&name) else { continue };
        check_factors(&name, (linear.rows, linear.columns), &entry.factors)?;
        let factors = &entry.factors;
        weight.compensate(if entry.scaling == 1.0 { factors.clone() } else { factors.scaled(entry.scaling) });
    }
    Ok(())
}

pub(crate) fn check_factors(name: &str, shape: (usize, usize), factors: &LowRank) -> Result<()> {
    if (factors.out_features(), factors.in_features()) == shape {
        return Ok(());
    }
    let (rows, columns) = shape;
    Err(Error::new(
        ErrorCode::AdapterInvalid,
        format!(
            "the factors update a {}×{} matrix, but the Linear is {rows}×{columns}",
            factors.out_features(),
            factors.in_features()
        ),
    )
    .subject(name)
    .hint("Use an adapter that was made for this base model"))
}

fn read_linear(checkpoint: &Checkpoint, spec: &DecoderSpec, block: usize, linear: &LinearSpec) -> Result<LinearWeight> {
    let name = spec.linear_name(block, linear);
    let mut weight = stored_linear(checkpoint, spec, &name)?;
    check_shape(&name, (linear.rows, linear.columns), (weight.matrix.rows(), weight.matrix.columns()))?;
    match (&weight.bias, linear.bias) {
        (None, true) => {
            return Err(Error::new(ErrorCode::CheckpointTensorMissing, "the Linear needs a bias, which is missing")
                .subject(format!("{name}.bias"))
                .hint("Take config.json from the folder that the weights come from"));
        }
        // Some exporters write zeros where the architecture has no bias.
        (Some(bias), false) if bias.iter().any(|&value| value != 0.0) => {
            return Err(Error::new(ErrorCode::ConfigUnsupported, "config.json says that this Linear has no bias")
                .subject(format!("{name}.bias"))
                .hint("Take config.json from the folder that the weights come from"));
        }
        (Some(_), false) => weight.bias = None,
        _ => {}
    }
    Ok(weight)
}

/// The Linear as `[out, in]`. Compressed ones are never stored otherwise.
fn stored_linear(checkpoint: &Checkpoint, spec: &DecoderSpec, name: &str) -> Result<LinearWeight> {
    let plain = format!("{name}.weight");
    let is_outputs_by_inputs = checkpoint.rows_are_outputs() || checkpoint.is_quantized(name);
    if !spec.family.transposed || is_outputs_by_inputs || checkpoint.tensor(&plain).is_none() {
        return checkpoint.linear(name);
    }
    let matrix = checkpoint.dense(&plain)?.transposed();
    let bias_name = format!("{name}.bias");
    let bias = match checkpoint.tensor(&bias_name) {
        Some(_) => Some(checkpoint.vector(&bias_name)?),
        None => None,
    };
    if let Some(bias) = &bias {
        check_shape(&bias_name, (matrix.rows(), 1), (bias.len(), 1))?;
    }
    Ok(LinearWeight { matrix: WeightMatrix::Dense(matrix), bias, low_rank: None })
}

fn read_norm(checkpoint: &Checkpoint, spec: &DecoderSpec, name: &str, width: usize) -> Result<NormWeight> {
    let vector = |part: &str| {
        let name = format!("{name}.{part}");
        let values = checkpoint.vector(&name)?;
        check_shape(&name, (width, 1), (values.len(), 1))?;
        Ok(values)
    };
    Ok(match spec.family.norm {
        NormKind::Rms => NormWeight::Rms(vector("weight")?),
        NormKind::RmsPlusOne => NormWeight::Rms(vector("weight")?.into_iter().map(|weight| 1.0 + weight).collect()),
        NormKind::Layer => NormWeight::Layer { weight: vector("weight")?, bias: vector("bias")? },
    })
}

fn check_shape(name: &str, expected: (usize, usize), found: (usize, usize)) -> Result<()> {
    if expected == found {
        return Ok(());
    }
    let message = format!("is {}×{}, but config.json says {}×{}", found.0, found.1, expected.0, expected.1);
    Err(Error::new(ErrorCode::CheckpointShape, message)
        .subject(name)
        .hint("Take config.json from the folder that the weights come from"))
}
