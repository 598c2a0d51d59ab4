use kintsugi_runtime::Result;
use kintsugi_weights::{QuantizedMatrix, packed_words};
use safetensors::Dtype;
use serde_json::{Map, Value};

use super::compressed_tensors::{self, SCALE, ZERO_POINT};
use super::packed_codes;
use crate::linear_format::{EncodedTensor, LinearFormat, MatrixForm};
use crate::packed_rows::{pack_rows, transposed, unpack_rows};
use crate::safetensors_writer::{float_bytes, float_dtype};
use crate::{LinearTensors, QuantizationConfig};

/// compressed-tensors `pack-quantized`, the format that is written by default.
///
/// Format: `compressors/pack_quantized` of <https://github.com/vllm-project/compressed-tensors>. For a Linear `NAME`
/// with N outputs, K inputs and G groups per row:
///
/// | tensor | type, shape | content |
/// |---|---|---|
/// | `NAME.weight_packed` | i32 `[N, ⌈K·bits/32⌉]` | codes of a row, densely, lowest bits first |
/// | `NAME.weight_scale` | float `[N, G]` | one per group |
/// | `NAME.weight_zero_point` | i32 `[⌈N·bits/32⌉, G]` | zero points packed along the rows; asymmetric grids only |
/// | `NAME.weight_shape` | i64 `[2]` | N, K |
/// | `NAME.weight_g_idx` | i32 `[K]` | group of each column, where columns are not in group order |
///
/// The format thinks in signed integers and stores them plus `2^(bits−1)`, codes and zero points alike; that sum is
/// the unsigned code of [`QuantizedMatrix`], so nothing is converted. A row whose length is no multiple of the group
/// size ends in a shorter group: G is rounded up. The layout holds that, but other readers refuse it.
#[derive(Clone, Copy, Debug)]
pub struct PackQuantized;

impl LinearFormat for PackQuantized {
    fn name(&self) -> &'static str {
        "compressed-tensors/pack-quantized"
    }

    fn method(&self) -> &'static str {
        compressed_tensors::METHOD
    }

    fn layout_fields(&self) -> &'static [&'static str] {
        &[compressed_tensors::LAYOUT_FIELD]
    }

    fn layouts(&self) -> &'static [&'static str] {
        &["", "pack-quantized"]
    }

    fn marker(&self) -> &'static str {
        packed_codes::PACKED
    }

    fn read_config(&self, config: &Map<String, Value>) -> Result<QuantizationConfig> {
        compressed_tensors::read_config(&PackQuantized, config)
    }

    fn write_config(&self, config: &QuantizationConfig) -> Result<Value> {
        Ok(compressed_tensors::write_config(config, "pack-quantized"))
    }

    fn check(&self, form: &MatrixForm) -> Result<(), String> {
        form.check_integers()
    }

    fn shape(&self, _config: &QuantizationConfig, linear: &LinearTensors<'_>) -> Result<(usize, usize)> {
        packed_codes::shape(linear)
    }

    fn decode(&self, config: &QuantizationConfig, linear: &LinearTensors<'_>) -> Result<QuantizedMatrix> {
        let bits = config.bits;
        let (rows, columns) = self.shape(config, linear)?;
        let codes = packed_codes::read(linear, rows, columns, bits)?;
        compressed_tensors::join(config, linear, [rows, columns], codes, |groups| {
            let height = packed_codes::words(linear, rows, bits)?;
            let packed: Vec<u32> = linear.integers(ZERO_POINT, Dtype::I32, &[height, groups])?;
            let by_group = unpack_rows(&transposed(&packed, height, groups), rows, bits);
            Ok(transposed(&by_group, groups, rows))
        })
    }

    fn encode(&self, matrix: &QuantizedMatrix, emit: &mut dyn FnMut(EncodedTensor<'_>) -> Result<()>) -> Result<()> {
        let (rows, groups, bits) = (matrix.rows(), matrix.groups(), matrix.bits());
        packed_codes::write(matrix, emit)?;

        let scales = float_bytes(matrix.scales(), matrix.scale_type());
        let dtype = float_dtype(matrix.scale_type());
        emit(EncodedTensor { suffix: SCALE, dtype, shape: vec![rows, groups], bytes: &scales })?;

        let Some(zero_points) = matrix.zero_points() else { return Ok(()) };
        let height = packed_words(rows, bits);
        let by_group = pack_rows(&transposed(zero_points, rows, groups), rows, bits);
        let packed = transposed(&by_group, groups, height);
        let (shape, bytes) = (vec![height, groups], bytemuck::cast_slice(&packed));
        emit(EncodedTensor { suffix: ZERO_POINT, dtype: Dtype::I32, shape, bytes })
    }
}
