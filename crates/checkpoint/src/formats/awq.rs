use kintsugi_runtime::{Error, ErrorCode, Result};
use kintsugi_weights::{GroupAxis, QuantizedMatrix, QuantizedParts};
use safetensors::Dtype;
use serde_json::{Map, Value, json};

use super::assemble;
use super::gptq::check_groups_and_scales;
use crate::config_fields::{bool_or, integer, invalid, strings, unsupported};
use crate::linear_format::{EncodedTensor, LinearFormat, MatrixForm};
use crate::packed_rows::{pack_rows, transposed, unpack_rows};
use crate::safetensors_writer::{float_bytes, float_dtype};
use crate::scheme::group_size_number;
use crate::{LinearTensors, QuantizationConfig, Scheme};

const CODES: &str = "qweight";
const ZERO_POINTS: &str = "qzeros";
const SCALES: &str = "scales";

/// The only width.
const BITS: u8 = 4;
/// Codes in a word.
const LANES: usize = 8;
/// Which of eight neighbouring columns the nibbles of a word hold, from the lowest on.
const ORDER: [usize; LANES] = [0, 2, 4, 6, 1, 3, 5, 7];

/// The head, which stays as it is unless a field of its own says otherwise.
const HEAD: &str = "lm_head";

/// AWQ in the layout `GEMM`, as AutoAWQ, GPTQModel, transformers and vLLM read it.
///
/// Format: `awq/modules/linear/gemm.py` of <https://github.com/casper-hansen/AutoAWQ>. For a Linear `NAME` with N
/// outputs, K inputs and G groups per row:
///
/// | tensor | type, shape | content |
/// |---|---|---|
/// | `NAME.qweight` | i32 `[K, N/8]` | codes of eight neighbouring outputs in the nibble order 0 2 4 6 1 3 5 7 |
/// | `NAME.qzeros` | i32 `[G, N/8]` | zero points in the same order; always there |
/// | `NAME.scales` | float `[G, N]` | one per group |
///
/// The readers compute with `qzeros` whatever the configuration says, so a symmetric grid is written as zero points of
/// 8 under `zero_point: true`, with `sym` for those who want to know. That field is true in every configuration that
/// transformers has saved, so it counts only where the zero points agree; where they do not there is nothing to report.
#[derive(Clone, Copy, Debug)]
pub struct Awq;

impl LinearFormat for Awq {
    fn name(&self) -> &'static str {
        "awq"
    }

    fn method(&self) -> &'static str {
        "awq"
    }

    fn layout_fields(&self) -> &'static [&'static str] {
        &["version", "format"]
    }

    fn layouts(&self) -> &'static [&'static str] {
        &["", "gemm"]
    }

    fn marker(&self) -> &'static str {
        CODES
    }

    fn read_config(&self, config: &Map<String, Value>) -> Result<QuantizationConfig> {
        // The second names are those of quant_config.json.
        let bits = integer(config, "bits")?.or(integer(config, "w_bit")?).ok_or_else(|| invalid("bits", "there"))?;
        if bits != i64::from(BITS) {
            return Err(unsupported("bits", &bits.to_string()));
        }
        let size = integer(config, "group_size")?.or(integer(config, "q_group_size")?);
        let size = size.ok_or_else(|| invalid("group_size", "there"))?;
        let (bits, group_size) = Scheme::grid(bits, size)?;
        let mut ignore = strings(config, "modules_to_not_convert")?;
        if !bool_or(config, HEAD, false)? && !ignore.iter().any(|entry| entry == HEAD) {
            ignore.push(HEAD.to_string());
        }
        let symmetric = !bool_or(config, "zero_point", true)? || bool_or(config, "sym", false)?;
        let scheme = Scheme { bits, group_size, group_axis: GroupAxis::Input, symmetric, group_index: false };
        Ok(QuantizationConfig::uniform(&Awq, scheme, ignore))
    }

    fn write_config(&self, config: &QuantizationConfig) -> Result<Value> {
        if let Some(exception) = config.exceptions.first() {
            let message = "the format awq has one width and one group size for all Linears";
            return Err(Error::new(ErrorCode::QuantizationUnsupported, message)
                .subject(exception.linears.text())
                .hint("Write it as compressed-tensors/pack-quantized, which can, or quantize all alike"));
        }
        // Readers look for the entries inside the names of modules.
        if let Some(pattern) = config.ignore.iter().find(|entry| entry.starts_with("re:")) {
            let message = format!("the format awq cannot exclude Linears by the pattern '{pattern}'");
            return Err(Error::new(ErrorCode::QuantizationUnsupported, message)
                .subject("ignore")
                .hint("Write it as compressed-tensors/pack-quantized, which can, or name the Linears"));
        }
        let mut json = json!({
            "quant_method": self.method(),
            "version": "gemm",
            "bits": config.bits,
            "group_size": group_size_number(config.group_size),
            "zero_point": true,
            "modules_to_not_convert": if config.ignore.is_empty() { Value::Null } else { json!(config.ignore) },
        });
        if let Some(fields) = json.as_object_mut() {
            if config.symmetric {
                fields.insert("sym".into(), json!(true));
            }
            if !config.ignore.iter().any(|entry| entry == HEAD) {
                fields.insert(HEAD.into(), json!(true));
            }
        }
        Ok(json)
    }

    fn settle(&self, config: &mut QuantizationConfig, linear: &LinearTensors<'_>) -> Result<Option<String>> {
        if !config.symmetric {
            return Ok(None);
        }
        let (rows, columns) = self.shape(config, linear)?;
        let zero_points = unpack(linear, ZERO_POINTS, config.group_size.groups(columns), rows)?;
        config.symmetric = zero_points.iter().all(|&zero| zero == 1 << (BITS - 1));
        Ok(None)
    }

    fn takes_exceptions(&self) -> bool {
        false
    }

    fn check(&self, form: &MatrixForm) -> Result<(), String> {
        if form.bits != BITS {
            return Err(format!("its codes have {} bits, the format has {BITS}", form.bits));
        }
        if form.group_index {
            return Err("its columns have groups of their own, the format knows only runs of columns".into());
        }
        if !form.rows.is_multiple_of(LANES) {
            return Err(format!("it has {} outputs, which is no multiple of {LANES}", form.rows));
        }
        check_groups_and_scales(form)
    }

    fn shape(&self, _config: &QuantizationConfig, linear: &LinearTensors<'_>) -> Result<(usize, usize)> {
        let (columns, words) = linear.matrix_shape(CODES)?;
        let rows = words.checked_mul(LANES);
        Ok((rows.ok_or_else(|| linear.impossible(CODES, "the tensor has an impossible size"))?, columns))
    }

    fn decode(&self, config: &QuantizationConfig, linear: &LinearTensors<'_>) -> Result<QuantizedMatrix> {
        let (rows, columns) = self.shape(config, linear)?;
        let groups = config.group_size.groups(columns);
        let codes = transposed(&unpack(linear, CODES, columns, rows)?, columns, rows);
        let (scales, scale_type) = linear.scales(SCALES, [groups, rows])?;
        let stored = unpack(linear, ZERO_POINTS, groups, rows)?;
        let zero_points = if config.symmetric {
            if let Some(other) = stored.iter().find(|&&zero| zero != 1 << (BITS - 1)) {
                let message = format!("the zero point {other} is stored, a symmetric grid stores 8");
                return Err(linear.contradiction(ZERO_POINTS, message));
            }
            None
        } else {
            Some(transposed(&stored, groups, rows))
        };
        assemble(
            linear,
            QuantizedParts {
                rows,
                columns,
                bits: BITS,
                group_size: config.group_size,
                codes,
                scales: transposed(&scales, groups, rows),
                scale_type,
                zero_points,
                ..QuantizedParts::default()
            },
        )
    }

    fn encode(&self, matrix: &QuantizedMatrix, emit: &mut dyn FnMut(EncodedTensor<'_>) -> Result<()>) -> Result<()> {
        let (rows, columns, groups) = (matrix.rows(), matrix.columns(), matrix.groups());
        let mut words = |suffix: &'static str, height: usize, mut values: Vec<u8>| {
            reorder(&mut values, |word, nibbles| nibbles.copy_from_slice(&ORDER.map(|column| word[column])));
            let packed = pack_rows(&values, rows, BITS);
            let (shape, bytes) = (vec![height, rows / LANES], bytemuck::cast_slice(&packed));
            emit(EncodedTensor { suffix, dtype: Dtype::I32, shape, bytes })
        };
        words(CODES, columns, transposed(matrix.codes(), rows, columns))?;
        let zero_points = match matrix.zero_points() {
            Some(zero_points) => transposed(zero_points, rows, groups),
            None => vec![1 << (BITS - 1); groups * rows],
        };
        words(ZERO_POINTS, groups, zero_points)?;

        let scales = float_bytes(&transposed(matrix.scales(), rows, groups), matrix.scale_type());
        let dtype = float_dtype(matrix.scale_type());
        emit(EncodedTensor { suffix: SCALES, dtype, shape: vec![groups, rows], bytes: &scales })
    }
}

/// A packed tensor of `height` lines as `[height, rows]`, columns in their natural order.
fn unpack(linear: &LinearTensors<'_>, suffix: &str, height: usize, rows: usize) -> Result<Vec<u8>> {
    let packed: Vec<u32> = linear.integers(suffix, Dtype::I32, &[height, rows / LANES])?;
    let mut values = unpack_rows(&packed, rows, BITS);
    reorder(&mut values, |nibbles, word| {
        ORDER.iter().zip(nibbles).for_each(|(&column, &nibble)| word[column] = nibble)
    });
    Ok(values)
}

/// Lets `permute` make each eight values from what they were.
fn reorder(values: &mut [u8], permute: impl Fn(&[u8; LANES], &mut [u8; LANES])) {
    let (words, _) = values.as_chunks_mut::<LANES>();
    for word in words {
        let before = *word;
        permute(&before, word);
    }
}
