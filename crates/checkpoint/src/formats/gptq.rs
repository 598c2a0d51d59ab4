use std::collections::{BTreeMap, BTreeSet};

use kintsugi_runtime::Result;
use kintsugi_weights::{ElementType, GroupAxis, GroupSize, QuantizedMatrix, QuantizedParts};
use safetensors::Dtype;
use serde_json::{Map, Value, json};

use super::assemble;
use crate::config_fields::{bool_or, integer, invalid, object, string_or, unsupported};
use crate::linear_format::{EncodedTensor, LinearFormat, MatrixForm};
use crate::packed_rows::{pack_rows, transposed, unpack_rows};
use crate::safetensors_writer::{float_bytes, float_dtype};
use crate::scheme::{ExpressionReader, group_size_number};
use crate::{LinearTarget, LinearTensors, QuantizationConfig, Scheme, SchemeException};

const CODES: &str = "qweight";
const ZERO_POINTS: &str = "qzeros";
const SCALES: &str = "scales";
const GROUP_INDEX: &str = "g_idx";

/// Widths of a code that programs for the format know.
const BITS: [u8; 4] = [2, 3, 4, 8];

/// Linears that vLLM joins, and the name it gives them.
const JOINED: [(&str, &[&str]); 2] =
    [("qkv_proj", &["q_proj", "k_proj", "v_proj"]), ("gate_up_proj", &["gate_proj", "up_proj"])];

/// The head, which the format speaks of in a field of its own.
const HEAD: &str = "lm_head";

/// GPTQ, as AutoGPTQ, GPTQModel, transformers and vLLM read it.
///
/// Format: `nn_modules/qlinear` of <https://github.com/ModelCloud/GPTQModel>. For a Linear `NAME` with N outputs, K
/// inputs and G groups per row:
///
/// | tensor | type, shape | content |
/// |---|---|---|
/// | `NAME.qweight` | i32 `[K·bits/32, N]` | codes of a row down the column, densely, lowest bits first |
/// | `NAME.qzeros` | i32 `[G, N·bits/32]` | zero points of a group, densely, lowest bits first; always there |
/// | `NAME.scales` | float `[G, N]` | one per group |
/// | `NAME.g_idx` | i32 `[K]` | group of each column |
///
/// Dense packing of 3 bits puts 32 codes into three words: ten, two bits and one of the next, ten, one bit and two of
/// the next, ten.
///
/// The versions differ in `qzeros`: v1 stores the zero point minus one, v2 the zero point. In v1 the zero point 0 wraps
/// to 2^bits−1, which readers take for 0 or for 2^bits, and which carries into the neighbour where a reader adds one to
/// whole words. It is read as 0, the only one of the two that quantizers choose, and not written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gptq {
    /// `checkpoint_format: gptq`
    V1,
    /// `checkpoint_format: gptq_v2`
    V2,
}

impl Gptq {
    /// The one of the table.
    fn shared(self) -> &'static dyn LinearFormat {
        match self {
            Gptq::V1 => &Gptq::V1,
            Gptq::V2 => &Gptq::V2,
        }
    }

    /// What is stored for the zero point of a symmetric grid.
    fn stored_middle(self, bits: u8) -> u8 {
        (1 << (bits - 1)) - u8::from(self == Gptq::V1)
    }

    /// `qzeros` as it is stored, `[G, N]`.
    fn stored_zero_points(linear: &LinearTensors<'_>, rows: usize, groups: usize, bits: u8) -> Result<Vec<u8>> {
        let width = exact_words(rows, bits).ok_or_else(|| {
            linear.impossible(CODES, format!("zero points of {rows} outputs do not fill whole words at {bits} bits"))
        })?;
        let packed: Vec<u32> = linear.integers(ZERO_POINTS, Dtype::I32, &[groups, width])?;
        Ok(unpack_rows(&packed, rows, bits))
    }

    /// `None` where the columns are in group order, which files say by an index too.
    fn group_index(
        config: &QuantizationConfig,
        linear: &LinearTensors<'_>,
        columns: usize,
        groups: usize,
    ) -> Result<Option<Vec<u32>>> {
        // Files without act-order of the first years have no index.
        if !config.group_index && !linear.has(GROUP_INDEX) {
            return Ok(None);
        }
        let Some(index) = linear.group_index(GROUP_INDEX, columns, groups)? else { return Ok(None) };
        let size = config.group_size.columns(columns);
        if index.iter().enumerate().all(|(column, &group)| group as usize == column / size) {
            return Ok(None);
        }
        if !config.group_index {
            let message = "columns have groups of their own, but desc_act is false".to_string();
            return Err(linear.contradiction(GROUP_INDEX, message));
        }
        Ok(Some(index))
    }
}

impl LinearFormat for Gptq {
    fn name(&self) -> &'static str {
        match self {
            Gptq::V1 => "gptq",
            Gptq::V2 => "gptq_v2",
        }
    }

    fn method(&self) -> &'static str {
        "gptq"
    }

    fn layout_fields(&self) -> &'static [&'static str] {
        &["checkpoint_format", "format"]
    }

    fn layouts(&self) -> &'static [&'static str] {
        match self {
            Gptq::V1 => &["", "gptq"],
            Gptq::V2 => &["gptq_v2"],
        }
    }

    fn marker(&self) -> &'static str {
        CODES
    }

    fn read_config(&self, config: &Map<String, Value>) -> Result<QuantizationConfig> {
        let bits = integer(config, "bits")?.ok_or_else(|| invalid("bits", "there"))?;
        let size = integer(config, "group_size")?.ok_or_else(|| invalid("group_size", "there"))?;
        let (bits, group_size) = Scheme::grid(bits, size)?;
        if !BITS.contains(&bits) {
            return Err(unsupported("bits", &bits.to_string()));
        }
        let pack_type = string_or(config, "pack_dtype", "int32")?;
        if pack_type != "int32" {
            return Err(unsupported("pack_dtype", pack_type));
        }
        if bool_or(config, "is_marlin_format", false)? {
            return Err(unsupported("is_marlin_format", "true"));
        }
        let mut ignore = Vec::new();
        if !bool_or(config, HEAD, false)? {
            ignore.push(HEAD.to_string());
        }
        let (symmetric, group_index) = (bool_or(config, "sym", true)?, bool_or(config, "desc_act", false)?);
        let usual = Scheme { bits, group_size, group_axis: GroupAxis::Input, symmetric, group_index };
        let mut exceptions = Vec::new();
        let mut expressions = ExpressionReader::new("dynamic");
        if let Some(rules) = config.get("dynamic").filter(|rules| !rules.is_null()) {
            for (rule, fields) in object(rules, "dynamic")? {
                match rule.strip_prefix("-:") {
                    Some(excluded) => ignore.push(format!("re:{excluded}")),
                    None => exceptions.push(read_rule(rule, object(fields, rule)?, usual, &mut expressions)?),
                }
            }
        }
        Ok(QuantizationConfig { exceptions, ..QuantizationConfig::uniform(self.shared(), usual, ignore) })
    }

    fn write_config(&self, config: &QuantizationConfig) -> Result<Value> {
        let excluded = |entry: &String| match entry.strip_prefix("re:") {
            Some(pattern) => format!("-:{pattern}"),
            None => format!("-:^{}$", entry.replace('.', r"\.")),
        };
        let mut rules: Map<String, Value> = config
            .ignore
            .iter()
            .filter(|entry| *entry != HEAD)
            .map(|entry| (excluded(entry), Value::Object(Map::new())))
            .collect();
        for SchemeException { linears, scheme } in
            config.exceptions.iter().filter(|other| other.scheme != config.scheme())
        {
            rules.insert(format!("+:{}", linears.to_expression()), rule_fields(*scheme));
        }
        for (name, scheme) in fused(config) {
            let fields = rule_fields(scheme);
            rules.insert(format!("+:{}", LinearTarget::name(name).to_expression()), fields);
        }
        let mut json = json!({
            "quant_method": self.method(),
            "checkpoint_format": self.name(),
            "bits": config.bits,
            "group_size": group_size_number(config.group_size),
            "desc_act": config.group_index,
            "sym": config.symmetric,
            "lm_head": !config.ignore.iter().any(|entry| entry == HEAD),
            "pack_dtype": "int32",
        });
        if let Some(fields) = json.as_object_mut().filter(|_| !rules.is_empty()) {
            fields.insert("dynamic".into(), Value::Object(rules));
        }
        Ok(json)
    }

    /// Published files say v1 and hold v2, and the other way round. On a symmetric grid every zero point is in the
    /// middle, so what is stored tells.
    fn settle(&self, config: &mut QuantizationConfig, linear: &LinearTensors<'_>) -> Result<Option<String>> {
        if !config.symmetric {
            return Ok(None);
        }
        let (rows, columns) = self.shape(config, linear)?;
        let groups = config.group_size.groups(columns);
        let stored: BTreeSet<u8> = Self::stored_zero_points(linear, rows, groups, config.bits)?.into_iter().collect();
        let holds = |version: &&Gptq| stored.iter().eq(&[version.stored_middle(config.bits)]);
        match [Gptq::V1, Gptq::V2].iter().find(holds) {
            Some(version) if version != self => {
                config.format = version.shared();
                Ok(Some(format!(
                    "the quantization config says {}, but {}.{ZERO_POINTS} holds the zero points of {}; they are read \
                     as {}",
                    self.name(),
                    linear.name(),
                    version.name(),
                    version.name(),
                )))
            }
            _ => Ok(None),
        }
    }

    fn check(&self, form: &MatrixForm) -> Result<(), String> {
        if !BITS.contains(&form.bits) {
            return Err(format!("its codes have {} bits, the format has 2, 3, 4 or 8", form.bits));
        }
        // Readers of the format count words by the 32.
        for (what, count) in [("outputs", form.rows), ("inputs", form.columns)] {
            if !count.is_multiple_of(32) {
                return Err(format!("it has {count} {what}, which is no multiple of 32"));
            }
        }
        check_groups_and_scales(form)?;
        if *self == Gptq::V1 && form.smallest_zero_point == Some(0) {
            return Err("version 1 has no place for the zero point 0".into());
        }
        Ok(())
    }

    fn shape(&self, config: &QuantizationConfig, linear: &LinearTensors<'_>) -> Result<(usize, usize)> {
        let (words, rows) = linear.matrix_shape(CODES)?;
        let columns = words.checked_mul(32).filter(|bits| bits.is_multiple_of(usize::from(config.bits)));
        let columns = columns
            .map(|bits| bits / usize::from(config.bits))
            .filter(|&columns| exact_words(columns, config.bits) == Some(words));
        let message = || format!("{words} words hold no whole number of codes of {} bits", config.bits);
        Ok((rows, columns.ok_or_else(|| linear.impossible(CODES, message()))?))
    }

    fn decode(&self, config: &QuantizationConfig, linear: &LinearTensors<'_>) -> Result<QuantizedMatrix> {
        let bits = config.bits;
        let (rows, columns) = self.shape(config, linear)?;
        let groups = config.group_size.groups(columns);

        let height = columns * usize::from(bits) / 32;
        let packed: Vec<u32> = linear.integers(CODES, Dtype::I32, &[height, rows])?;
        let codes = unpack_rows(&transposed(&packed, height, rows), columns, bits);
        drop(packed);

        let (scales, scale_type) = linear.scales(SCALES, [groups, rows])?;
        let scales = transposed(&scales, groups, rows);

        let mut stored = Self::stored_zero_points(linear, rows, groups, bits)?;
        let zero_points = if config.symmetric {
            let middle = self.stored_middle(bits);
            if let Some(other) = stored.iter().find(|&&zero| zero != middle) {
                let name = self.name();
                let message = format!("the zero point {other} is stored, a symmetric grid stores {middle} in {name}");
                return Err(linear.contradiction(ZERO_POINTS, message));
            }
            None
        } else {
            if *self == Gptq::V1 {
                let mask = u8::MAX >> (8 - bits);
                stored.iter_mut().for_each(|zero| *zero = zero.wrapping_add(1) & mask);
            }
            Some(transposed(&stored, groups, rows))
        };

        let group_size = config.group_size;
        let group_index = Self::group_index(config, linear, columns, groups)?;
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

    fn encode(&self, matrix: &QuantizedMatrix, emit: &mut dyn FnMut(EncodedTensor<'_>) -> Result<()>) -> Result<()> {
        let (rows, columns, groups, bits) = (matrix.rows(), matrix.columns(), matrix.groups(), matrix.bits());
        let mut words = |suffix: &'static str, shape: Vec<usize>, values: &[u32]| {
            emit(EncodedTensor { suffix, dtype: Dtype::I32, shape, bytes: bytemuck::cast_slice(values) })
        };

        let height = columns * usize::from(bits) / 32;
        let packed = transposed(&pack_rows(matrix.codes(), columns, bits), rows, height);
        words(CODES, vec![height, rows], &packed)?;

        let width = rows * usize::from(bits) / 32;
        let stored = match matrix.zero_points() {
            // The check has refused the zero point 0 in version 1.
            Some(zero_points) => {
                let minus = u8::from(*self == Gptq::V1);
                let stored: Vec<u8> = zero_points.iter().map(|zero| zero - minus).collect();
                transposed(&stored, rows, groups)
            }
            None => vec![self.stored_middle(bits); groups * rows],
        };
        words(ZERO_POINTS, vec![groups, width], &pack_rows(&stored, rows, bits))?;

        let index: Vec<u32> = (0..columns).map(|column| matrix.group_of(column) as u32).collect();
        words(GROUP_INDEX, vec![columns], &index)?;

        let scales = float_bytes(&transposed(matrix.scales(), rows, groups), matrix.scale_type());
        let dtype = float_dtype(matrix.scale_type());
        emit(EncodedTensor { suffix: SCALES, dtype, shape: vec![groups, rows], bytes: &scales })
    }
}

/// What every reader of GPTQ and AWQ asks of groups and scales.
///
/// # Errors
/// What stands against it, as a clause.
pub(super) fn check_groups_and_scales(form: &MatrixForm) -> Result<(), String> {
    form.check_integers()?;
    if let (true, GroupSize::Columns(size)) = (form.is_ragged(), form.group_size) {
        return Err(format!("its {} inputs are no multiple of the group size {size}", form.columns));
    }
    // Readers convert scales to the 16-bit type of the model; those of f32 would change.
    if form.scale_type == ElementType::F32 {
        return Err("its scales are f32, readers of the format take 16 bits".into());
    }
    Ok(())
}

/// What a rule of `dynamic` says.
fn rule_fields(scheme: Scheme) -> Value {
    json!({
        "bits": scheme.bits,
        "group_size": group_size_number(scheme.group_size),
        "desc_act": scheme.group_index,
        "sym": scheme.symmetric,
    })
}

/// The names under which vLLM asks for the scheme of Linears that it joins, where all of these have one and it is not
/// the usual one: it matches rules against `qkv_proj`, `gate_up_proj` and `experts`, never against their parts.
fn fused(config: &QuantizationConfig) -> BTreeMap<String, Scheme> {
    // By joined name: the scheme of all parts, and which of them are there.
    let mut joined: BTreeMap<String, (Option<Scheme>, BTreeSet<&str>)> = BTreeMap::new();
    for exception in config.exceptions.iter().filter(|exception| !exception.linears.is_expression()) {
        let Some((place, part)) = exception.linears.text().rsplit_once('.') else { continue };
        let name = if let Some((experts, _)) = place.rsplit_once(".experts.") {
            Some((format!("{experts}.experts"), ""))
        } else {
            let whole = JOINED.iter().find(|(_, parts)| parts.contains(&part));
            whole.map(|(whole, _)| (format!("{place}.{whole}"), part))
        };
        let Some((name, part)) = name else { continue };
        let (scheme, parts) = joined.entry(name).or_insert((Some(exception.scheme), BTreeSet::new()));
        *scheme = scheme.filter(|scheme| *scheme == exception.scheme);
        parts.insert(part);
    }
    let whole = |name: &str, parts: &BTreeSet<&str>| {
        JOINED.iter().all(|(whole, all)| !name.ends_with(whole) || parts.len() == all.len())
    };
    let uniform = joined.into_iter().filter_map(|(name, (scheme, parts))| {
        let scheme = scheme.filter(|scheme| *scheme != config.scheme() && whole(&name, &parts))?;
        Some((name, scheme))
    });
    uniform.collect()
}

/// A rule of `dynamic`: an expression, marked as positive or not at all, and the fields in which its Linears differ.
///
/// # Errors
/// `ERR_QUANTIZATION_UNSUPPORTED`, `ERR_CONFIG_INVALID`.
fn read_rule(
    rule: &str,
    fields: &Map<String, Value>,
    usual: Scheme,
    expressions: &mut ExpressionReader<'_>,
) -> Result<SchemeException> {
    let known = ["bits", "group_size", "sym", "desc_act"];
    if let Some(stranger) = fields.keys().find(|field| !known.contains(&field.as_str())) {
        return Err(unsupported("dynamic", &format!("{rule} with {stranger}")));
    }
    let bits = integer(fields, "bits")?.unwrap_or(i64::from(usual.bits));
    let size = integer(fields, "group_size")?.unwrap_or(group_size_number(usual.group_size));
    let (bits, group_size) = Scheme::grid(bits, size)?;
    if !BITS.contains(&bits) {
        return Err(unsupported("bits", &bits.to_string()));
    }
    let symmetric = bool_or(fields, "sym", usual.symmetric)?;
    let group_index = bool_or(fields, "desc_act", usual.group_index)?;
    let linears = expressions.read(rule.strip_prefix("+:").unwrap_or(rule))?;
    let scheme = Scheme { bits, group_size, group_axis: GroupAxis::Input, symmetric, group_index };
    Ok(SchemeException { linears, scheme })
}

/// Words that `count` codes fill without a rest.
fn exact_words(count: usize, bits: u8) -> Option<usize> {
    count.checked_mul(usize::from(bits)).filter(|total| total.is_multiple_of(32)).map(|total| total / 32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_name_what_vllm_joins() {
        let usual = Scheme {
            bits: 4,
            group_size: GroupSize::Columns(64),
            group_axis: GroupAxis::Input,
            symmetric: true,
            group_index: false,
        };
        let eight = Scheme { bits: 8, ..usual };
        let mut linears = BTreeMap::new();
        let mut put = |name: &str, scheme| linears.insert(format!("model.layers.0.{name}"), scheme);
        for name in ["q_proj", "k_proj", "v_proj", "o_proj"] {
            put(&format!("self_attn.{name}"), eight);
        }
        for (name, scheme) in [("gate_proj", usual), ("up_proj", eight), ("down_proj", eight)] {
            put(&format!("mlp.{name}"), scheme);
        }
        for expert in 0..3 {
            for name in ["gate_proj", "up_proj", "down_proj"] {
                put(&format!("mlp.experts.{expert}.{name}"), eight);
                put(&format!("other.experts.{expert}.{name}"), if expert < 2 { eight } else { usual });
            }
        }
        for other in 0..40 {
            put(&format!("rest.{other}"), usual);
        }
        let config = QuantizationConfig::describing(&Gptq::V2, &linears, Vec::new()).unwrap();
        assert_eq!(config.scheme(), usual);
        let names: Vec<String> = fused(&config).into_keys().collect();
        assert_eq!(names, ["model.layers.0.mlp.experts", "model.layers.0.self_attn.qkv_proj"]);
        let json = config.to_json().unwrap();
        let rules = json["dynamic"].as_object().unwrap();
        assert_eq!(rules[r"+:^model\.layers\.0\.self_attn\.qkv_proj$"]["bits"], 8);
        assert_eq!(rules[r"+:^model\.layers\.0\.self_attn\.q_proj$"]["bits"], 8);
        let read = QuantizationConfig::from_json(&json).unwrap();
        for (name, scheme) in &linears {
            assert_eq!(read.scheme_of(name), *scheme, "{name}");
        }
    }
}
