use kintsugi_runtime::Result;
use kintsugi_weights::{CodeTable, ElementType, QuantizedMatrix, QuantizedParts};
use safetensors::Dtype;
use serde_json::{Map, Value};

use super::{assemble, compressed_tensors, nibbles, read_only};
use crate::float8_scaling::float8;
use crate::linear_format::{EncodedTensor, LinearFormat, MatrixForm};
use crate::{LinearTensors, QuantizationConfig};

const CODES: &str = "weight_packed";
const SCALE: &str = "weight_scale";
const GLOBAL_SCALE: &str = "weight_global_scale";

/// Four-bit floats with a scale per short run of columns, as compressed-tensors stores them. Read only.
///
/// Formats: `compressors/nvfp4` and `compressors/mxfp4` of <https://github.com/vllm-project/compressed-tensors>; the
/// numbers are those of the OCP Microscaling Formats specification. For a Linear `NAME` with N outputs and K inputs:
///
/// | tensor | NVFP4 | MXFP4 |
/// |---|---|---|
/// | `NAME.weight_packed` | u8 `[N, K/2]`, the even column in the low nibble | the same |
/// | `NAME.weight_scale` | F8_E4M3 `[N, K/16]` | u8 `[N, K/32]`, an exponent of two plus 127 |
/// | `NAME.weight_global_scale` | f32 `[1]`, which scales are divided by | |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Float4 {
    /// `nvfp4-pack-quantized`
    Nv,
    /// `mxfp4-pack-quantized`
    Mx,
}

impl Float4 {
    /// Columns that share a scale.
    fn group(self) -> usize {
        match self {
            Float4::Nv => 16,
            Float4::Mx => 32,
        }
    }

    fn shared(self) -> &'static dyn LinearFormat {
        match self {
            Float4::Nv => &Float4::Nv,
            Float4::Mx => &Float4::Mx,
        }
    }

    /// Scales as f32, `[rows, groups]`, and the narrowest type that holds them.
    fn scales(self, linear: &LinearTensors<'_>, rows: usize, groups: usize) -> Result<(Vec<f32>, ElementType)> {
        match self {
            Float4::Nv => {
                let stored: Vec<u8> = linear.integers(SCALE, Dtype::F8_E4M3, &[rows, groups])?;
                let global = linear.flat_scales(GLOBAL_SCALE, [1, 1])?[0];
                let scales: Vec<f32> = stored.iter().map(|&code| float8(code) / global).collect();
                match scales.iter().position(|scale| !scale.is_finite()) {
                    None => Ok((scales, ElementType::F32)),
                    Some(at) => {
                        let message = format!("the scale of row {}, group {} is not finite", at / groups, at % groups);
                        Err(linear.corrupt(SCALE, message))
                    }
                }
            }
            Float4::Mx => {
                let stored: Vec<u8> = linear.integers(SCALE, Dtype::U8, &[rows, groups])?;
                if let Some(at) = stored.iter().position(|&exponent| exponent == u8::MAX) {
                    let message = format!("the scale of row {}, group {} is not a number", at / groups, at % groups);
                    return Err(linear.corrupt(SCALE, message));
                }
                // 2^−127 is subnormal in both types.
                let power = |&exponent: &u8| f32::powi(2.0, i32::from(exponent) - 127);
                Ok((stored.iter().map(power).collect(), ElementType::Bf16))
            }
        }
    }
}

impl LinearFormat for Float4 {
    fn name(&self) -> &'static str {
        match self {
            Float4::Nv => "compressed-tensors/nvfp4-pack-quantized",
            Float4::Mx => "compressed-tensors/mxfp4-pack-quantized",
        }
    }

    fn method(&self) -> &'static str {
        compressed_tensors::METHOD
    }

    fn layout_fields(&self) -> &'static [&'static str] {
        &[compressed_tensors::LAYOUT_FIELD]
    }

    fn layouts(&self) -> &'static [&'static str] {
        match self {
            Float4::Nv => &["nvfp4-pack-quantized"],
            Float4::Mx => &["mxfp4-pack-quantized"],
        }
    }

    fn marker(&self) -> &'static str {
        CODES
    }

    fn read_config(&self, config: &Map<String, Value>) -> Result<QuantizationConfig> {
        compressed_tensors::read_float_config(self.shared(), config, self.group())
    }

    fn write_config(&self, _config: &QuantizationConfig) -> Result<Value> {
        Err(read_only(self.name()))
    }

    fn check(&self, _form: &MatrixForm) -> Result<(), String> {
        Err("the format is read, not written".into())
    }

    fn shape(&self, _config: &QuantizationConfig, linear: &LinearTensors<'_>) -> Result<(usize, usize)> {
        let (rows, bytes) = linear.matrix_shape(CODES)?;
        let columns = bytes.checked_mul(2);
        Ok((rows, columns.ok_or_else(|| linear.impossible(CODES, "the tensor has an impossible size"))?))
    }

    fn decode(&self, config: &QuantizationConfig, linear: &LinearTensors<'_>) -> Result<QuantizedMatrix> {
        let (rows, columns) = self.shape(config, linear)?;
        let packed: Vec<u8> = linear.integers(CODES, Dtype::U8, &[rows, columns / 2])?;
        let groups = config.group_size.groups(columns);
        let (scales, scale_type) = self.scales(linear, rows, groups)?;
        let parts = QuantizedParts {
            rows,
            columns,
            bits: 4,
            group_size: config.group_size,
            codes: nibbles(&packed, false),
            scales,
            scale_type,
            code_table: Some(CodeTable::FP4),
            ..QuantizedParts::default()
        };
        assemble(linear, parts)
    }

    fn encode(&self, _matrix: &QuantizedMatrix, _emit: &mut dyn FnMut(EncodedTensor<'_>) -> Result<()>) -> Result<()> {
        Err(read_only(self.name()))
    }
}
