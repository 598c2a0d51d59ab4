use kintsugi_runtime::Result;
use kintsugi_weights::{GroupAxis, QuantizedMatrix, QuantizedParts};
use safetensors::Dtype;
use serde_json::{Map, Value, json};

use super::compressed_tensors::{GROUP_INDEX, SCALE, ZERO_POINT};
use super::{assemble, packed_codes};
use crate::config_fields::{bool_or, integer, invalid, object, string_or, strings, unsupported};
use crate::linear_format::{CodeGrid, EncodedTensor, LinearFormat, MatrixForm};
use crate::packed_rows::{pack_rows, unpack_rows};
use crate::safetensors_writer::{float_bytes, float_dtype};
use crate::scheme::group_size_number;
use crate::{LinearTarget, LinearTensors, QuantizationConfig, Scheme, SchemeException};

/// The version of the layout that is written and read.
const VERSION: i64 = 1;

/// This project's own layout, for what no common one holds: groups along the outputs (AdaDim, arXiv 2309.15531), and
/// Linears that differ in it. `docs/formats.md` describes it for other readers. For a Linear `NAME` with N outputs,
/// K inputs and groups of g weights:
///
/// | tensor | type, shape | content |
/// |---|---|---|
/// | `NAME.weight_packed` | i32 `[N, ⌈K·bits/32⌉]` | codes of a row, densely, lowest bits first |
/// | `NAME.weight_scale` | float `[N, ⌈K/g⌉]`, along the outputs `[⌈N/g⌉, K]` | one per group |
/// | `NAME.weight_zero_point` | i32 `[⌈scales·bits/32⌉]` | in the order of the scales, packed like codes; asymmetric grids only |
/// | `NAME.weight_shape` | i64 `[2]` | N, K |
/// | `NAME.weight_g_idx` | i32 `[K]` | group of each column, where columns are not in group order |
///
/// A weight is `(code − zero) · scale`, with `zero = 2^(bits−1)` on symmetric grids. The configuration holds `version`,
/// the usual `bits`, `group_size` (−1 for the whole row), `group_axis` (`input` or `output`), `symmetric` and `group_index`,
/// and under `linears` the same fields of every Linear that differs.
#[derive(Clone, Copy, Debug)]
pub struct Kintsugi;

impl LinearFormat for Kintsugi {
    fn name(&self) -> &'static str {
        "kintsugi"
    }

    fn method(&self) -> &'static str {
        "kintsugi"
    }

    fn layout_fields(&self) -> &'static [&'static str] {
        &[]
    }

    fn layouts(&self) -> &'static [&'static str] {
        &[""]
    }

    fn marker(&self) -> &'static str {
        packed_codes::PACKED
    }

    fn read_config(&self, config: &Map<String, Value>) -> Result<QuantizationConfig> {
        let version = integer(config, "version")?.ok_or_else(|| invalid("version", "there"))?;
        if version != VERSION {
            return Err(unsupported("version", &version.to_string()));
        }
        let usual = read_scheme(config, None)?;
        let mut exceptions = Vec::new();
        if let Some(linears) = config.get("linears").filter(|linears| !linears.is_null()) {
            for (name, fields) in object(linears, "linears")? {
                let scheme = read_scheme(object(fields, name)?, Some(usual))?;
                exceptions.push(SchemeException { linears: LinearTarget::name(name), scheme });
            }
        }
        let ignore = strings(config, "ignore")?;
        Ok(QuantizationConfig { exceptions, ..QuantizationConfig::uniform(&Kintsugi, usual, ignore) })
    }

    fn write_config(&self, config: &QuantizationConfig) -> Result<Value> {
        let mut json = write_scheme(config.scheme());
        json.insert("quant_method".into(), json!(self.method()));
        json.insert("version".into(), json!(VERSION));
        let differing = config.exceptions.iter().filter(|exception| exception.scheme != config.scheme());
        let mut linears = Map::new();
        for exception in differing {
            if exception.linears.is_expression() {
                return Err(unsupported("linears", exception.linears.text()));
            }
            linears.insert(exception.linears.text().to_owned(), Value::Object(write_scheme(exception.scheme)));
        }
        json.insert("linears".into(), Value::Object(linears));
        json.insert("ignore".into(), json!(config.ignore));
        Ok(Value::Object(json))
    }

    fn is_common(&self) -> bool {
        false
    }

    fn check(&self, form: &MatrixForm) -> Result<(), String> {
        match form.grid {
            CodeGrid::Integers => Ok(()),
            CodeGrid::Offsets => Err("its groups have offsets in place of zero points".into()),
            CodeGrid::Table => Err("its codes stand for the values of a table".into()),
        }
    }

    fn shape(&self, _config: &QuantizationConfig, linear: &LinearTensors<'_>) -> Result<(usize, usize)> {
        packed_codes::shape(linear)
    }

    fn decode(&self, config: &QuantizationConfig, linear: &LinearTensors<'_>) -> Result<QuantizedMatrix> {
        let Scheme { bits, group_size, group_axis, symmetric, group_index } = config.scheme();
        let (rows, columns) = self.shape(config, linear)?;
        let codes = packed_codes::read(linear, rows, columns, bits)?;
        let [height, width] = grid_shape(rows, columns, config.scheme());
        let (scales, scale_type) = linear.scales(SCALE, [height, width])?;
        let zero_points = if symmetric {
            linear.refuse_unannounced(ZERO_POINT, "the grid is asymmetric")?;
            None
        } else {
            let count = packed_codes::words(linear, scales.len(), bits)?;
            let packed: Vec<u32> = linear.integers(ZERO_POINT, Dtype::I32, &[count])?;
            Some(unpack_rows(&packed, scales.len(), bits))
        };
        let group_index = if group_index && group_axis == GroupAxis::Input {
            if linear.has(GROUP_INDEX) { linear.group_index(GROUP_INDEX, columns, width)? } else { None }
        } else {
            linear.refuse_unannounced(GROUP_INDEX, "columns have groups of their own")?;
            None
        };
        let parts = QuantizedParts {
            rows,
            columns,
            bits,
            group_size,
            group_axis,
            codes,
            scales,
            scale_type,
            zero_points,
            group_index,
            ..QuantizedParts::default()
        };
        assemble(linear, parts)
    }

    fn encode(&self, matrix: &QuantizedMatrix, emit: &mut dyn FnMut(EncodedTensor<'_>) -> Result<()>) -> Result<()> {
        let (rows, columns, bits) = (matrix.rows(), matrix.columns(), matrix.bits());
        packed_codes::write(matrix, emit)?;

        if let Some(zero_points) = matrix.zero_points() {
            let packed = pack_rows(zero_points, zero_points.len(), bits);
            let (shape, bytes) = (vec![packed.len()], bytemuck::cast_slice(&packed));
            emit(EncodedTensor { suffix: ZERO_POINT, dtype: Dtype::I32, shape, bytes })?;
        }

        let [height, width] = grid_shape(rows, columns, Scheme::of(matrix));
        let scales = float_bytes(matrix.scales(), matrix.scale_type());
        let dtype = float_dtype(matrix.scale_type());
        emit(EncodedTensor { suffix: SCALE, dtype, shape: vec![height, width], bytes: &scales })
    }
}

/// The shape of the scales.
fn grid_shape(rows: usize, columns: usize, scheme: Scheme) -> [usize; 2] {
    match scheme.group_axis {
        GroupAxis::Input => [rows, scheme.group_size.groups(columns)],
        GroupAxis::Output => [scheme.group_size.groups(rows), columns],
    }
}

/// The scheme in `fields`; what is missing is as usual.
fn read_scheme(fields: &Map<String, Value>, usual: Option<Scheme>) -> Result<Scheme> {
    let number = |field: &str, usual: Option<i64>| -> Result<i64> {
        integer(fields, field)?.or(usual).ok_or_else(|| invalid(field, "there"))
    };
    let bits = number("bits", usual.map(|usual| i64::from(usual.bits)))?;
    let size = number("group_size", usual.map(|usual| group_size_number(usual.group_size)))?;
    let (bits, group_size) = Scheme::grid(bits, size)?;
    let usual_axis = usual.map_or(GroupAxis::Input, |usual| usual.group_axis);
    let group_axis = match string_or(fields, "group_axis", axis_name(usual_axis))? {
        "input" => GroupAxis::Input,
        "output" => GroupAxis::Output,
        other => return Err(unsupported("group_axis", other)),
    };
    let symmetric = bool_or(fields, "symmetric", usual.is_some_and(|usual| usual.symmetric))?;
    let group_index = bool_or(fields, "group_index", usual.is_some_and(|usual| usual.group_index))?;
    Ok(Scheme { bits, group_size, group_axis, symmetric, group_index })
}

fn write_scheme(scheme: Scheme) -> Map<String, Value> {
    let mut fields = Map::new();
    fields.insert("bits".into(), json!(scheme.bits));
    fields.insert("group_size".into(), json!(group_size_number(scheme.group_size)));
    fields.insert("group_axis".into(), json!(axis_name(scheme.group_axis)));
    fields.insert("symmetric".into(), json!(scheme.symmetric));
    fields.insert("group_index".into(), json!(scheme.group_index));
    fields
}

fn axis_name(axis: GroupAxis) -> &'static str {
    match axis {
        GroupAxis::Input => "input",
        GroupAxis::Output => "output",
    }
}
