use kintsugi_runtime::{Error, ErrorCode, Result};
use kintsugi_weights::DenseMatrix;
use safetensors::Dtype;
use serde_json::{Map, Value};

use crate::LinearTensors;
use crate::config_fields::{invalid, object, require_empty, string_or, unsupported};
use crate::safetensors_file::not_finite;

const WEIGHT: &str = "weight";
/// Names of the scale: that of compressed-tensors, and that of `fp8`, which is multiplied all the same.
const SCALES: [&str; 2] = ["weight_scale", "weight_scale_inv"];

/// How the F8_E4M3 weights of a checkpoint are scaled: `w = stored · scale`, one scale per tile of the matrix.
///
/// Such weights are floats of low precision, not codes on a grid: a Linear is read as a dense matrix, and the checkpoint
/// counts as one that is not quantized. Products are rounded once, to f32; with bf16 scales they are exact.
///
/// Formats: `float-quantized` of <https://github.com/vllm-project/compressed-tensors>, and `quant_method: fp8` of
/// transformers (`FineGrainedFP8Config`), where tiles are 128×128 and the scale is called `weight_scale_inv`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Float8Scaling {
    /// Rows and columns of a tile; `None` is all of them.
    tile: [Option<usize>; 2],
}

impl Float8Scaling {
    /// Understands a `quantization_config`; `None` when it does not speak of F8_E4M3 weights.
    ///
    /// # Errors
    /// `ERR_QUANTIZATION_UNSUPPORTED` for activations with stored scales and for other types of 8 bits,
    /// `ERR_CONFIG_INVALID`.
    pub(crate) fn from_json(value: &Value) -> Result<Option<Self>> {
        let config = object(value, "quantization_config")?;
        match string_or(config, "quant_method", "")? {
            "fp8" => Self::from_fp8(config).map(Some),
            "compressed-tensors" => Self::from_compressed_tensors(config),
            _ => Ok(None),
        }
    }

    fn from_fp8(config: &Map<String, Value>) -> Result<Self> {
        let kind = string_or(config, "fmt", "e4m3")?;
        if kind != "e4m3" {
            return Err(unsupported("fmt", kind));
        }
        // Activations that are rounded while the model runs leave no trace in the weights; stored scales would.
        let activations = string_or(config, "activation_scheme", "dynamic")?;
        if activations != "dynamic" {
            return Err(unsupported("activation_scheme", activations));
        }
        let tile = match config.get("weight_block_size") {
            None | Some(Value::Null) => [None, None],
            Some(size) => tile_of(size, "weight_block_size")?,
        };
        Ok(Float8Scaling { tile })
    }

    fn from_compressed_tensors(config: &Map<String, Value>) -> Result<Option<Self>> {
        if !["float-quantized", "naive-quantized"].contains(&string_or(config, "format", "")?) {
            return Ok(None);
        }
        require_empty(config, "kv_cache_scheme")?;
        let groups = config.get("config_groups").ok_or_else(|| invalid("config_groups", "an object of schemes"))?;
        let mut scaling = None;
        for (name, group) in object(groups, "config_groups")? {
            let group = object(group, name)?;
            let weights = object(group.get("weights").unwrap_or(&Value::Null), "weights")?;
            let (kind, bits) = (string_or(weights, "type", "int")?, weights.get("num_bits"));
            if kind != "float" {
                return Ok(None);
            }
            if bits.is_some_and(|bits| bits != 8) {
                return Err(unsupported("weights.num_bits", "other than 8 of type float"));
            }
            if let Some(activations) = group.get("input_activations").and_then(Value::as_object)
                && activations.get("dynamic") != Some(&Value::Bool(true))
            {
                return Err(unsupported("input_activations", "of static scales"));
            }
            let tile = match string_or(weights, "strategy", "tensor")? {
                "tensor" => [None, None],
                "channel" => [Some(1), None],
                "block" => tile_of(weights.get("block_structure").unwrap_or(&Value::Null), "block_structure")?,
                other => return Err(unsupported("weights.strategy", other)),
            };
            if scaling.replace(Float8Scaling { tile }).is_some_and(|first| first.tile != tile) {
                return Err(unsupported("config_groups", "several schemes that differ"));
            }
        }
        Ok(scaling)
    }

    /// Reads a Linear whose weight is F8_E4M3.
    ///
    /// # Errors
    /// `ERR_CHECKPOINT_TENSOR_MISSING`, `ERR_CHECKPOINT_DTYPE`, `ERR_CHECKPOINT_SHAPE`, `ERR_CHECKPOINT_NOT_FINITE`.
    pub(crate) fn decode(self, linear: &LinearTensors<'_>) -> Result<DenseMatrix> {
        let (rows, columns) = linear.matrix_shape(WEIGHT)?;
        let [tile_rows, tile_columns] =
            [(self.tile[0], rows), (self.tile[1], columns)].map(|(size, extent)| size.unwrap_or(extent).min(extent));
        let suffix = SCALES.into_iter().find(|suffix| linear.has(suffix)).unwrap_or(SCALES[0]);
        let across = columns.div_ceil(tile_columns);
        let scales = linear.flat_scales(suffix, [rows.div_ceil(tile_rows), across])?;

        let stored: Vec<u8> = linear.integers(WEIGHT, Dtype::F8_E4M3, &[rows, columns])?;
        let meaning: Vec<f32> = (0..=u8::MAX).map(float8).collect();
        let mut values = Vec::with_capacity(stored.len());
        for (row, line) in stored.chunks_exact(columns).enumerate() {
            let scales = &scales[row / tile_rows * across..][..across];
            for (codes, &scale) in line.chunks(tile_columns).zip(scales) {
                values.extend(codes.iter().map(|&code| meaning[usize::from(code)] * scale));
            }
        }
        let matrix = DenseMatrix::from_f32(rows, columns, values);
        match matrix.first_not_finite() {
            None => Ok(matrix),
            Some((row, column)) => {
                Err(not_finite(&format!("{}.{WEIGHT}", linear.name()), &format!("row {row}, column {column}")))
            }
        }
    }

    /// That a tensor of this type is not copied: its scale and the configuration that explains it stay behind.
    pub(crate) fn refuse_copy(tensor: &str) -> Error {
        Error::new(ErrorCode::QuantizationUnsupported, "a weight of 8-bit floats cannot be copied without its scales")
            .subject(tensor)
            .hint("Start from a checkpoint in which only the Linears of the blocks are 8-bit floats")
    }
}

/// `[rows, columns]` of a tile.
fn tile_of(size: &Value, field: &str) -> Result<[Option<usize>; 2]> {
    let sizes: Option<Vec<usize>> = size.as_array().map(|sizes| {
        sizes.iter().filter_map(|size| usize::try_from(size.as_u64()?).ok().filter(|&size| size > 0)).collect()
    });
    match (sizes.as_deref(), size.as_array().map(Vec::len)) {
        (Some(&[rows, columns]), Some(2)) => Ok([Some(rows), Some(columns)]),
        _ => Err(invalid(field, "two positive numbers")),
    }
}

/// The value of an F8_E4M3 number: a sign, 4 bits of exponent with bias 7, 3 of mantissa; no infinities, and all ones is
/// NaN (<https://arxiv.org/abs/2209.05433>).
pub(crate) fn float8(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let magnitude = match (exponent, code & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa / 8.0 * 2.0f32.powi(-6),
        _ => (1.0 + mantissa / 8.0) * 2.0f32.powi(exponent - 7),
    };
    if code >> 7 == 1 { -magnitude } else { magnitude }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn landmarks_of_the_number_format() {
        let cases = [
            (0x00, 0.0),
            (0x01, 2.0f32.powi(-9)),
            (0x07, 7.0 * 2.0f32.powi(-9)),
            (0x08, 2.0f32.powi(-6)),
            (0x38, 1.0),
            (0x3c, 1.5),
            (0xb8, -1.0),
            (0x7e, 448.0),
            (0xfe, -448.0),
        ];
        for (code, value) in cases {
            assert_eq!(float8(code), value, "{code:#x}");
        }
        assert!(float8(0x7f).is_nan() && float8(0xff).is_nan());
        assert!(float8(0x80) == 0.0 && float8(0x80).is_sign_negative());
    }

    #[test]
    fn configurations_of_other_weights_are_none() {
        use serde_json::json;
        for other in [
            json!({ "quant_method": "gptq" }),
            json!({ "quant_method": "compressed-tensors", "format": "pack-quantized" }),
            json!({ "quant_method": "compressed-tensors", "format": "naive-quantized",
                "config_groups": { "group_0": { "weights": { "type": "int", "num_bits": 8 } } } }),
        ] {
            assert_eq!(Float8Scaling::from_json(&other).unwrap(), None, "{other}");
        }
    }
}
