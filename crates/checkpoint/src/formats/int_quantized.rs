use kintsugi_runtime::Result;
use kintsugi_weights::{QuantizedMatrix, QuantizedParts};
use safetensors::Dtype;
use serde_json::{Map, Value};

use super::{assemble, compressed_tensors, read_only};
use crate::linear_format::{EncodedTensor, LinearFormat, MatrixForm};
use crate::{LinearTensors, QuantizationConfig};

const CODES: &str = "weight";
const SCALE: &str = "weight_scale";
const ZERO_POINT: &str = "weight_zero_point";
const GROUP_INDEX: &str = "weight_g_idx";

/// compressed-tensors `int-quantized` and `naive-quantized`: one signed byte per weight, whatever the width of a code.
/// Read only: `pack-quantized` holds the same in fewer or equal bytes.
///
/// Format: `compressors/naive_quantized` of <https://github.com/vllm-project/compressed-tensors>. For a Linear `NAME`
/// with N outputs, K inputs and G groups per row:
///
/// | tensor | type, shape | content |
/// |---|---|---|
/// | `NAME.weight` | i8 `[N, K]` | signed codes, −2^(bits−1) … 2^(bits−1)−1 |
/// | `NAME.weight_scale` | float `[N, G]` | one per group |
/// | `NAME.weight_zero_point` | i8 `[N, G]` | signed zero points; asymmetric grids only |
/// | `NAME.weight_g_idx` | i32 `[K]` | group of each column, where columns are not in group order |
#[derive(Clone, Copy, Debug)]
pub struct IntQuantized;

impl LinearFormat for IntQuantized {
    fn name(&self) -> &'static str {
        "compressed-tensors/int-quantized"
    }

    fn method(&self) -> &'static str {
        compressed_tensors::METHOD
    }

    fn layout_fields(&self) -> &'static [&'static str] {
        &[compressed_tensors::LAYOUT_FIELD]
    }

    fn layouts(&self) -> &'static [&'static str] {
        &["int-quantized", "naive-quantized"]
    }

    fn marker(&self) -> &'static str {
        CODES
    }

    fn read_config(&self, config: &Map<String, Value>) -> Result<QuantizationConfig> {
        compressed_tensors::read_config(&IntQuantized, config)
    }

    fn write_config(&self, _config: &QuantizationConfig) -> Result<Value> {
        Err(read_only(self.name()))
    }

    fn check(&self, _form: &MatrixForm) -> Result<(), String> {
        Err("the format is read, not written".into())
    }

    fn shape(&self, _config: &QuantizationConfig, linear: &LinearTensors<'_>) -> Result<(usize, usize)> {
        linear.matrix_shape(CODES)
    }

    fn decode(&self, config: &QuantizationConfig, linear: &LinearTensors<'_>) -> Result<QuantizedMatrix> {
        let bits = config.bits;
        let (rows, columns) = self.shape(config, linear)?;
        let groups = config.group_size.groups(columns);
        let codes = unsigned(linear, CODES, [rows, columns], bits)?;
        let (scales, scale_type) = linear.scales(SCALE, [rows, groups])?;
        let zero_points = if config.symmetric {
            linear.refuse_unannounced(ZERO_POINT, "the grid is asymmetric")?;
            None
        } else {
            Some(unsigned(linear, ZERO_POINT, [rows, groups], bits)?)
        };
        let group_index = if config.group_index {
            if linear.has(GROUP_INDEX) { linear.group_index(GROUP_INDEX, columns, groups)? } else { None }
        } else {
            linear.refuse_unannounced(GROUP_INDEX, "columns have groups of their own")?;
            None
        };
        let group_size = config.group_size;
        let parts = QuantizedParts {
            rows,
            columns,
            bits,
            group_size,
            codes,
            scales,
            scale_type,
            zero_points,
            group_index,
            ..QuantizedParts::default()
        };
        assemble(linear, parts)
    }

    fn encode(&self, _matrix: &QuantizedMatrix, _emit: &mut dyn FnMut(EncodedTensor<'_>) -> Result<()>) -> Result<()> {
        Err(read_only(self.name()))
    }
}

/// Signed numbers of `bits` bits plus `2^(bits−1)`, which makes them those of [`QuantizedMatrix`].
fn unsigned(linear: &LinearTensors<'_>, suffix: &str, shape: [usize; 2], bits: u8) -> Result<Vec<u8>> {
    let signed: Vec<i8> = linear.integers(suffix, Dtype::I8, &shape)?;
    let offset = 1i16 << (bits - 1);
    let shift = |(position, &value): (usize, &i8)| {
        u8::try_from(i16::from(value) + offset).ok().filter(|&code| i16::from(code) < 2 * offset).ok_or_else(|| {
            let (row, column) = (position / shape[1], position % shape[1]);
            let message = format!("{value} in row {row}, column {column} does not fit into {bits} bits");
            linear.corrupt(suffix, message)
        })
    };
    signed.iter().enumerate().map(shift).collect()
}
