use kintsugi_checkpoint::Checkpoint;
use kintsugi_checkpoint::gguf::check_gguf;
use kintsugi_compress::{AxisRule, QuantizeOptions};
use kintsugi_model::DecoderSpec;
use kintsugi_runtime::{Error, ErrorCode, Result};
use kintsugi_weights::ElementType;
use serde::Serialize;

use crate::bit_allocation::check_budget;
use crate::compression::refuse_compressed;
use crate::eora_recipe::FactorShare;
use crate::output_format::{OutputFormat, output_format};
use crate::{DiskPlan, MemoryPlan, Recipe};

/// What will be done to each Linear, before anything runs.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Plan {
    /// What was asked.
    pub recipe: Recipe,
    /// Format of the quantized Linears.
    pub format: String,
    /// Family of the decoder.
    pub architecture: String,
    /// Each Linear, in the order of the checkpoint.
    pub linears: Vec<PlannedLinear>,
    /// Weights that will be quantized.
    pub quantized_weights: u64,
    /// Bits of codes, scales, zero points and factors over the number of quantized weights.
    pub bits_per_weight: f64,
    /// Bytes of tensors that will be written, factors as they are in memory.
    pub bytes: u64,
    /// Bytes of the source's tensors.
    pub source_bytes: u64,
    /// The memory that the job takes, and how it keeps within its budget.
    pub memory: MemoryPlan,
    /// The disk space that the job takes.
    pub disk: DiskPlan,
}

/// One Linear of a [`Plan`].
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PlannedLinear {
    /// Name in the checkpoint.
    pub name: String,
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub columns: usize,
    /// Width of a code; `null` while a bit budget decides.
    pub bits: Option<u8>,
    /// Most that the rank can be; 0 without compensation.
    pub rank: usize,
    /// Bits of codes, scales, zero points and factors.
    pub stored_bits: u64,
}

impl Plan {
    /// Plans `recipe` from the headers of `checkpoint`, for `tokens` of calibration.
    ///
    /// # Errors
    /// `ERR_CHECKPOINT_TENSOR_MISSING` for a Linear without weights, `ERR_QUANTIZATION_UNSUPPORTED` for a checkpoint
    /// that is compressed already, `ERR_MEMORY_EXCEEDED` for a job that does not fit into its memory.
    pub fn new(recipe: &Recipe, checkpoint: &Checkpoint, spec: &DecoderSpec, tokens: usize) -> Result<Self> {
        refuse_compressed(checkpoint)?;
        let names: Vec<String> = (0..spec.layers)
            .flat_map(|block| spec.linears.iter().map(move |linear| spec.linear_name(block, linear)))
            .collect();
        recipe.overrides.iter().try_for_each(|given| given.check_used(&names))?;
        let source_bytes: u64 = checkpoint.tensors().map(|tensor| tensor.bytes).sum();
        let mut replaced = 0;
        let mut linears = Vec::new();
        let shares = recipe.eora.as_ref().map(|eora| eora.shares(spec)).unwrap_or_default();
        for block in 0..spec.layers {
            for (place, linear) in spec.linears.iter().enumerate() {
                let name = spec.linear_name(block, linear);
                if !checkpoint.has_linear(&name) {
                    return Err(Error::new(
                        ErrorCode::CheckpointTensorMissing,
                        "the checkpoint lacks a weight that config.json names",
                    )
                    .subject(format!("{name}.weight"))
                    .hint("Take config.json from the folder that the weights come from"));
                }
                replaced += checkpoint.parts_of(&name).map(|tensor| tensor.bytes).sum::<u64>();
                let share = shares.get(place).copied().unwrap_or_default();
                linears.push(planned_linear(recipe, name, (linear.rows, linear.columns), share));
            }
        }
        let mut stored_bits: u64 = linears.iter().map(|linear| linear.stored_bits).sum();
        let factor_bytes = shares.iter().map(|share| share.file_bytes).sum::<u64>() * spec.layers as u64;
        // What files hold beyond the factors in memory: 16 bits for every code, and an A for every Linear.
        let mut file_excess = 0;
        if let Some(eora) = &recipe.eora {
            eora.check_budget(spec)?;
            let largest = shares.iter().map(|share| share.stored_bits).sum::<u64>() * spec.layers as u64;
            let of_budget = eora.budget_bits(spec).map_or(largest, |budget| budget.min(largest));
            stored_bits -= largest - of_budget;
            let in_file = u128::from(of_budget) * u128::from(factor_bytes) / u128::from(largest.max(1));
            file_excess = u64::try_from(in_file).unwrap_or(u64::MAX).saturating_sub(of_budget / 8);
        }
        let quantized_weights = spec.linear_parameters();
        let bytes = source_bytes - replaced + stored_bits.div_ceil(8);
        let written = bytes.saturating_add(file_excess);
        let stored = stored_type(checkpoint, spec);
        let format = output_format(recipe, spec, stored)?;
        check_budget(recipe, spec, format.layout(), stored)?;
        if let Some(plan) = format.gguf_plan(recipe) {
            check_gguf(checkpoint, &plan)?;
        }
        Ok(Plan {
            recipe: recipe.clone(),
            format: format.name(),
            architecture: spec.family.architecture.to_owned(),
            quantized_weights,
            bits_per_weight: stored_bits as f64 / quantized_weights as f64,
            bytes,
            source_bytes,
            memory: MemoryPlan::new(recipe, checkpoint, spec, tokens)?,
            disk: DiskPlan::new(recipe, checkpoint, spec, (written, factor_bytes), tokens)?.beside(match format {
                OutputFormat::Folder(_) => 0,
                // The file is written while the folder that it is made of is still there.
                OutputFormat::Gguf(_) => bytes,
            }),
            linears,
        })
    }
}

fn planned_linear(recipe: &Recipe, name: String, (rows, columns): (usize, usize), share: FactorShare) -> PlannedLinear {
    let options = recipe.quantize_options(&name, ElementType::F16);
    let (bits, grid_bits) = match recipe.bit_budget {
        // At most; whatever the widths, they take together what the budget says.
        Some(budget) => (None, (budget.min(17.0) * (rows * columns) as f64) as u64),
        None => (Some(options.bits), grid_bits(&options, (rows, columns), recipe.has_group_index())),
    };
    PlannedLinear { name, rows, columns, bits, rank: share.rank, stored_bits: grid_bits + share.stored_bits }
}

/// Bits of codes, scales, zero points and group index of a Linear; the more of both axes where either may be chosen.
pub(crate) fn grid_bits(options: &QuantizeOptions, (rows, columns): (usize, usize), has_group_index: bool) -> u64 {
    let along_inputs = rows * options.group_size.groups(columns);
    let along_outputs = columns * options.group_size.groups(rows);
    let groups = match options.group_axis {
        AxisRule::Input => along_inputs,
        AxisRule::Output => along_outputs,
        AxisRule::Adaptive => along_inputs.max(along_outputs),
    } as u64;
    let zero_bits = if options.symmetric { 0 } else { u64::from(options.bits) };
    let index_bits = if has_group_index { columns as u64 * 32 } else { 0 };
    let codes = (rows * columns) as u64 * u64::from(options.bits);
    codes + groups * (options.scale_type.bits() as u64 + zero_bits) + index_bits
}

/// The type that the Linears are stored in, after the first of them.
pub(crate) fn stored_type(checkpoint: &Checkpoint, spec: &DecoderSpec) -> ElementType {
    let first = spec.linears.first().map(|linear| spec.linear_name(0, linear));
    let weight = first.and_then(|name| checkpoint.tensor(&format!("{name}.weight")));
    weight.and_then(|tensor| ElementType::from_name(&tensor.dtype.to_ascii_lowercase())).unwrap_or(ElementType::F32)
}
