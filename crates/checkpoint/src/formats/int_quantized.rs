use kintsugi_runtime::Result;
use kintsugi_weights::QuantizedMatrix;
use safetensors::Dtype;
use serde_json::{Map, Value};

use super::{compressed_tensors, read_only};
use crate::linear_format::{EncodedTensor, LinearFormat, MatrixForm};
use crate::{LinearTensors, QuantizationConfig};

const CODES: &str = "weight";

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
        let (rows, columns) = self.shape(config, linear)?;
        let codes = unsigned(linear, CODES, [rows, columns], config.bits)?;
        compressed_tensors::join(config, linear, [rows, columns], codes, |groups| {
            unsigned(linear, compressed_tensors::ZERO_POINT, [rows, groups], config.bits)
        })
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
