use kintsugi_runtime::Result;
use kintsugi_weights::{CodeTable, ElementType, GroupAxis, GroupSize, QuantizedMatrix, QuantizedParts};
use safetensors::Dtype;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::{assemble, nibbles, read_only};
use crate::config_fields::{bool_or, string_or, strings, unsupported};
use crate::linear_format::{EncodedTensor, LinearFormat, MatrixForm};
use crate::{LinearTensors, QuantizationConfig, Scheme};

const CODES: &str = "weight";
const SCALES: &str = "weight.absmax";
const TABLE: &str = "weight.quant_map";
const NESTED_SCALES: &str = "weight.nested_absmax";
const NESTED_TABLE: &str = "weight.nested_quant_map";

/// Codes per scale that the library chooses when nobody asks.
const USUAL_BLOCK: usize = 64;

/// Largest description of a Linear that is read; they have about 100 bytes.
const STATE_LIMIT: usize = 4096;

/// bitsandbytes with 4 bits: a table of values, NF4 or its own kind of FP4. Read only.
///
/// Format: `functional.QuantState.as_dict(packed=True)` of
/// <https://github.com/bitsandbytes-foundation/bitsandbytes>. For a Linear `NAME` with N outputs and K inputs, whose
/// weights are cut row by row into blocks of B:
///
/// | tensor | type, shape | content |
/// |---|---|---|
/// | `NAME.weight` | u8 `[N·K/2, 1]` | codes, the first of a pair in the high nibble |
/// | `NAME.weight.absmax` | f32 or u8 `[N·K/B]` | the scale of each block, or its code |
/// | `NAME.weight.quant_map` | f32 `[16]` | what codes stand for |
/// | `NAME.weight.nested_absmax` | f32 `[⌈N·K/B/C⌉]` | nested: the scale of C codes of scales |
/// | `NAME.weight.nested_quant_map` | f32 `[256]` | nested: what codes of scales stand for |
/// | `NAME.weight.quant_state.bitsandbytes__nf4` (or `__fp4`) | u8 | JSON: `shape`, `blocksize`, nested sizes and offset |
///
/// A block may not lie in two rows, which it does where K is no multiple of B.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BitsAndBytes {
    /// `bnb_4bit_quant_type: nf4`
    Nf4,
    /// `bnb_4bit_quant_type: fp4`
    Fp4,
}

/// What the library writes about a Linear.
#[derive(Deserialize)]
struct State {
    shape: [usize; 2],
    blocksize: usize,
    nested_blocksize: Option<usize>,
    nested_offset: Option<f32>,
}

impl BitsAndBytes {
    fn shared(self) -> &'static dyn LinearFormat {
        match self {
            BitsAndBytes::Nf4 => &BitsAndBytes::Nf4,
            BitsAndBytes::Fp4 => &BitsAndBytes::Fp4,
        }
    }

    fn state(self, linear: &LinearTensors<'_>) -> Result<State> {
        let suffix = self.marker();
        let damaged = || linear.corrupt(suffix, "the tensor is not the description of a Linear".into());
        let length = linear.vector_length(suffix)?;
        if length > STATE_LIMIT {
            return Err(damaged());
        }
        let text: Vec<u8> = linear.integers(suffix, Dtype::U8, &[length])?;
        let state: State = serde_json::from_slice(&text).map_err(|_| damaged())?;
        let [rows, columns] = state.shape;
        let weights = rows.checked_mul(columns).filter(|&weights| weights > 0 && state.blocksize > 0);
        weights.map(|_| state).ok_or_else(damaged)
    }

    /// The scale of each block.
    fn scales(linear: &LinearTensors<'_>, state: &State, blocks: usize) -> Result<Vec<f32>> {
        let (Some(size), Some(offset)) = (state.nested_blocksize, state.nested_offset) else {
            return linear.floats(SCALES, blocks);
        };
        if size == 0 {
            return Err(linear.corrupt(SCALES, "scales are nested in blocks of nothing".into()));
        }
        let codes: Vec<u8> = linear.integers(SCALES, Dtype::U8, &[blocks])?;
        let table = linear.floats(NESTED_TABLE, 256)?;
        let scales = linear.floats(NESTED_SCALES, blocks.div_ceil(size))?;
        let scale = |(i, &code): (usize, &u8)| table[usize::from(code)] * scales[i / size] + offset;
        let scales: Vec<f32> = codes.iter().enumerate().map(scale).collect();
        match scales.iter().position(|scale| !scale.is_finite()) {
            None => Ok(scales),
            Some(block) => Err(linear.corrupt(SCALES, format!("the scale of block {block} is not finite"))),
        }
    }
}

impl LinearFormat for BitsAndBytes {
    fn name(&self) -> &'static str {
        match self {
            BitsAndBytes::Nf4 => "bitsandbytes/nf4",
            BitsAndBytes::Fp4 => "bitsandbytes/fp4",
        }
    }

    fn method(&self) -> &'static str {
        "bitsandbytes"
    }

    fn layout_fields(&self) -> &'static [&'static str] {
        &["bnb_4bit_quant_type"]
    }

    fn layouts(&self) -> &'static [&'static str] {
        match self {
            BitsAndBytes::Nf4 => &["nf4"],
            BitsAndBytes::Fp4 => &["fp4"],
        }
    }

    fn marker(&self) -> &'static str {
        match self {
            BitsAndBytes::Nf4 => "weight.quant_state.bitsandbytes__nf4",
            BitsAndBytes::Fp4 => "weight.quant_state.bitsandbytes__fp4",
        }
    }

    fn read_config(&self, config: &Map<String, Value>) -> Result<QuantizationConfig> {
        if !bool_or(config, "load_in_4bit", false)? {
            return Err(unsupported("load_in_4bit", "false"));
        }
        let storage = string_or(config, "bnb_4bit_quant_storage", "uint8")?;
        if storage != "uint8" {
            return Err(unsupported("bnb_4bit_quant_storage", storage));
        }
        // Each Linear says its own block size.
        let group_size = GroupSize::Columns(USUAL_BLOCK);
        let scheme = Scheme { bits: 4, group_size, group_axis: GroupAxis::Input, symmetric: false, group_index: false };
        Ok(QuantizationConfig::uniform(self.shared(), scheme, strings(config, "llm_int8_skip_modules")?))
    }

    fn write_config(&self, _config: &QuantizationConfig) -> Result<Value> {
        Err(read_only(self.name()))
    }

    fn check(&self, _form: &MatrixForm) -> Result<(), String> {
        Err("the format is read, not written".into())
    }

    fn shape(&self, _config: &QuantizationConfig, linear: &LinearTensors<'_>) -> Result<(usize, usize)> {
        let [rows, columns] = self.state(linear)?.shape;
        Ok((rows, columns))
    }

    fn decode(&self, _config: &QuantizationConfig, linear: &LinearTensors<'_>) -> Result<QuantizedMatrix> {
        let state = self.state(linear)?;
        let [rows, columns] = state.shape;
        if !columns.is_multiple_of(state.blocksize) {
            let size = state.blocksize;
            let message = format!("blocks of {size} weights lie across the rows of {columns} weights");
            return Err(linear.impossible(CODES, message));
        }
        let weights = rows * columns;
        let packed: Vec<u8> = linear.integers(CODES, Dtype::U8, &[weights.div_ceil(2), 1])?;
        let mut codes = nibbles(&packed, true);
        codes.truncate(weights);
        let table = linear.floats(TABLE, 16)?;
        let table = table.try_into().ok().and_then(|values| CodeTable::new(values).ok());
        let parts = QuantizedParts {
            rows,
            columns,
            bits: 4,
            group_size: GroupSize::Columns(state.blocksize),
            codes,
            scales: Self::scales(linear, &state, weights / state.blocksize)?,
            scale_type: ElementType::F32,
            code_table: Some(table.ok_or_else(|| linear.corrupt(TABLE, "the tensor is not a table".into()))?),
            ..QuantizedParts::default()
        };
        assemble(linear, parts)
    }

    fn encode(&self, _matrix: &QuantizedMatrix, _emit: &mut dyn FnMut(EncodedTensor<'_>) -> Result<()>) -> Result<()> {
        Err(read_only(self.name()))
    }
}
