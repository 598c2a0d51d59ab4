use std::collections::HashSet;
use std::path::PathBuf;
use std::time::Instant;

use kintsugi_checkpoint::gguf::{GGUF_TYPES, GgufPlan, GgufType, write_gguf};
use kintsugi_checkpoint::{Checkpoint, CheckpointWriter, CodeGrid, FORMATS, LinearFormat, MatrixForm, linear_format};
use kintsugi_compress::{Clip, QuantizeOptions, linear_method};
use kintsugi_model::DecoderSpec;
use kintsugi_runtime::{CancelToken, Error, ErrorCode, Progress, Result, ThreadPool, nearest};
use kintsugi_weights::{
    CODE_BITS, DenseMatrix, ElementType, GroupAxis, GroupSize, QuantizedMatrix, QuantizedParts, WeightMatrix,
};
use serde::Serialize;

use crate::output_format::GGUF;

/// Group sizes to try where the format does not hold that of the source.
const GROUP_SIZES: [GroupSize; 4] =
    [GroupSize::Columns(128), GroupSize::Columns(64), GroupSize::Columns(32), GroupSize::WholeRow];

/// A conversion of the quantized Linears of a checkpoint to another format, as the user asked for it.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ConvertRecipe {
    /// Folder of the checkpoint, or a GGUF file.
    pub source: PathBuf,
    /// Folder that is written, or GGUF file.
    pub out: PathBuf,
    /// Name of a format of quantized Linears, of a float type that they are widened to, or `gguf:` and a type of GGUF.
    pub format: String,
    /// Round Linears anew whose grid the format does not hold.
    pub allow_requantize: bool,
    /// Width of a code of Linears that are rounded anew; `null` takes the nearest that the format holds.
    pub bits: Option<u8>,
    /// Columns that share a scale there, 0 for the whole row; `null` likewise.
    pub group_size: Option<usize>,
    /// Only measure what it would cost.
    pub dry_run: bool,
}

/// What a conversion did, or would do.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ConversionReport {
    /// What was asked.
    pub recipe: ConvertRecipe,
    /// Format of the source.
    pub source_format: &'static str,
    /// Format that was written.
    pub format: String,
    /// Bytes of the source's tensors.
    pub source_bytes: u64,
    /// Bytes of the folder; 0 for a dry run.
    pub bytes: u64,
    /// Each Linear, in name order.
    pub linears: Vec<ConvertedLinear>,
    /// What the result does not say of the source, as sentences for the user.
    pub notices: Vec<String>,
    /// Seconds that it took.
    pub seconds: f64,
}

/// One Linear of a [`ConversionReport`].
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ConvertedLinear {
    /// Name in the checkpoint.
    pub name: String,
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub columns: usize,
    /// Bits of a weight, in codes or floats.
    pub bits: u8,
    /// Whether every weight kept its value.
    pub exact: bool,
    /// ‖W′ − W‖ / ‖W‖ between what is written and what was read; 0 where exact.
    pub error: f64,
}

/// What Linears become.
#[derive(Clone, Copy)]
enum Target {
    Quantized(&'static dyn LinearFormat),
    Dense(ElementType),
    Gguf(&'static GgufType),
}

impl Target {
    /// # Errors
    /// `ERR_OPTION_UNKNOWN`, with the nearest name and all names in the hint.
    fn of(name: &str) -> Result<Self> {
        if let Some(element) = ElementType::from_name(name) {
            return Ok(Target::Dense(element));
        }
        if let Some(name) = name.strip_prefix(GGUF) {
            return Ok(Target::Gguf(GgufType::written(name)?));
        }
        linear_format(name).map(Target::Quantized).map_err(|error| {
            let names: Vec<String> = FORMATS
                .iter()
                .map(|format| format.name().to_owned())
                .chain(ElementType::ALL.into_iter().map(|element| element.name().to_owned()))
                .chain(
                    GGUF_TYPES.iter().filter(|known| known.is_written()).map(|known| format!("{GGUF}{}", known.name)),
                )
                .collect();
            let closest = nearest(name, names.iter().map(String::as_str)).unwrap_or_default();
            error.hint(format!("Did you mean {closest:?}? Formats are: {}", names.join(", ")))
        })
    }
}

/// Writes the quantized Linears of a checkpoint in another format; everything else is copied.
///
/// Values stay as they are, bit for bit, where the format holds the grid. Where it does not, the Linear is rounded anew
/// to the nearest grid that it holds, if the recipe allows that. One Linear is in memory at a time. A GGUF file may also
/// be made of floats; what is written is read again and compared.
///
/// # Errors
/// `ERR_OPTION_UNKNOWN`, `ERR_OPTION_INVALID`; `ERR_QUANTIZATION_UNSUPPORTED` for a checkpoint without quantized
/// Linears; `ERR_CONVERSION_INEXACT` with the cost where rounding anew is needed and not allowed; what reading and
/// writing report. Nothing stays behind then.
pub fn convert(recipe: &ConvertRecipe, cancel: &CancelToken, progress: &Progress) -> Result<ConversionReport> {
    let started = Instant::now();
    let target = Target::of(&recipe.format)?;
    let checkpoint = Checkpoint::open(&recipe.source)?;
    let Converted { linears, bytes, notices } = match target {
        Target::Gguf(kind) => to_gguf(recipe, &checkpoint, kind, cancel, progress)?,
        Target::Quantized(_) | Target::Dense(_) => to_folder(recipe, &checkpoint, target, cancel, progress)?,
    };
    Ok(ConversionReport {
        source_format: source_format(&checkpoint),
        format: recipe.format.clone(),
        source_bytes: checkpoint.tensors().map(|tensor| tensor.bytes).sum(),
        bytes,
        linears,
        notices,
        seconds: started.elapsed().as_secs_f64(),
        recipe: recipe.clone(),
    })
}

/// What a conversion gives: the matrices and the bytes of the result, 0 for a dry run.
#[derive(Default)]
struct Converted {
    linears: Vec<ConvertedLinear>,
    bytes: u64,
    notices: Vec<String>,
}

fn source_format(checkpoint: &Checkpoint) -> &'static str {
    match (checkpoint.quantization(), checkpoint.block_type()) {
        (Some(quantization), _) => quantization.format.name(),
        (None, Some(_)) => "gguf",
        (None, None) => "floats",
    }
}

/// Into a folder in the layout of Hugging Face.
fn to_folder(
    recipe: &ConvertRecipe,
    checkpoint: &Checkpoint,
    target: Target,
    cancel: &CancelToken,
    progress: &Progress,
) -> Result<Converted> {
    let spec = DecoderSpec::of(checkpoint);
    let embedding = spec.as_ref().map(|spec| spec.name(spec.family.embedding)).unwrap_or_default();
    let mut names = checkpoint.quantized_linears();
    // No layout of folders keeps embeddings in codes.
    names.retain(|name| name != embedding);
    if names.is_empty() {
        return Err(Error::new(
            ErrorCode::QuantizationUnsupported,
            "the checkpoint has no quantized Linears to convert",
        )
        .subject(recipe.source.display())
        .hint("Compress it instead (kintsugi compress)"));
    }
    let ignore = match (&spec, checkpoint.quantization()) {
        // Formats differ in how they match such names, so that all that stays plain is named anew.
        (Ok(spec), _) => (0..spec.layers)
            .flat_map(|block| spec.linears.iter().map(move |linear| spec.linear_name(block, linear)))
            .chain(spec.routers())
            .chain([spec.family.head.to_owned()])
            .filter(|name| !names.contains(name))
            .collect(),
        (Err(_), Some(quantization)) => quantization.ignore.clone(),
        (Err(_), None) => Vec::new(),
    };
    let uniform = UniformGrid {
        group_size: checkpoint.quantization().map_or(GROUP_SIZES[0], |quantization| quantization.group_size),
        symmetric: checkpoint.quantization().is_some_and(|config| config.symmetric && config.exceptions.is_empty()),
    };
    progress.begin("convert", names.len() as u64);
    let mut writer = match (recipe.dry_run, target) {
        (true, _) => None,
        (false, Target::Quantized(format)) => Some(CheckpointWriter::create(&recipe.out, checkpoint)?.format(format)),
        (false, Target::Dense(element)) => {
            Some(CheckpointWriter::create(&recipe.out, checkpoint)?.element_type(Some(element)))
        }
        (false, Target::Gguf(_)) => None,
    };
    let mut replaced = HashSet::new();
    let mut linears = Vec::with_capacity(names.len());
    for name in &names {
        cancel.check()?;
        progress.at("convert", name.clone());
        replaced.extend(checkpoint.parts_of(name).map(|tensor| tensor.name.clone()));
        let WeightMatrix::Quantized(matrix) = checkpoint.linear(name)?.matrix else { continue };
        let (rows, columns) = (matrix.rows(), matrix.columns());
        let (bits, error) = match target {
            Target::Quantized(format) => {
                let uniform = if format.takes_exceptions() { None } else { Some(uniform) };
                let (fitting, error) = fit(&matrix, format, uniform, recipe).map_err(|error| error.subject(name))?;
                let written = fitting.as_ref().unwrap_or(&matrix);
                if let Some(writer) = &mut writer {
                    writer.write_linear(name, written)?;
                }
                (written.bits(), error)
            }
            Target::Gguf(_) => continue,
            Target::Dense(element) => {
                let values = matrix.to_f32();
                let rounded: Vec<f32> = values.iter().map(|&value| element.round(value)).collect();
                if rounded.iter().any(|value| !value.is_finite()) {
                    let message = format!("a weight is too large for {}", element.name());
                    return Err(Error::new(ErrorCode::QuantizationUnsupported, message)
                        .subject(name)
                        .hint("Convert to bf16 or f32"));
                }
                let error = relative_error(&values, &rounded);
                let matrix = DenseMatrix::from_f32(rows, columns, rounded);
                // Plain matrices of some families are [in, out].
                let matrix = if is_turned(&spec, name) { matrix.transposed() } else { matrix };
                if let Some(writer) = &mut writer {
                    let (tensor, shape) = (format!("{name}.weight"), [matrix.rows(), matrix.columns()]);
                    writer.write_dense(&tensor, &shape, &matrix.to_f32(), element)?;
                }
                (element.bits() as u8, error)
            }
        };
        linears.push(ConvertedLinear {
            name: name.clone(),
            rows,
            columns,
            bits,
            exact: error.is_none(),
            error: error.unwrap_or(0.0),
        });
        if let Some(writer) = &mut writer {
            writer.end_unit()?;
        }
        progress.advance(1);
    }
    if !recipe.allow_requantize && !recipe.dry_run {
        check_exact(&linears, recipe)?;
    }
    let mut bytes = 0;
    if let Some(mut writer) = writer {
        progress.at("write", "");
        for tensor in checkpoint.tensors().filter(|tensor| !replaced.contains(&tensor.name)) {
            cancel.check()?;
            writer.copy(&tensor.name)?;
        }
        if let Some(mut compensation) = checkpoint.compensation()? {
            // It belongs to the folder that is written.
            compensation.base_model = None;
            writer.write_compensation(&compensation)?;
        }
        bytes = match writer.quantization(ignore) {
            Some(config) => writer.seal(&config)?,
            None => writer.seal_plain()?,
        };
        cancel.check()?;
        writer.commit()?;
    }
    Ok(Converted { linears, bytes, notices: Vec::new() })
}

/// Whether the family keeps the plain matrix of this Linear as `[in, out]`.
fn is_turned(spec: &Result<DecoderSpec>, name: &str) -> bool {
    spec.as_ref().is_ok_and(|spec| spec.family.transposed && name.starts_with(spec.name(spec.family.blocks)))
}

/// Into a GGUF file; the matrices are compared with the source after they are written.
fn to_gguf(
    recipe: &ConvertRecipe,
    checkpoint: &Checkpoint,
    kind: &'static GgufType,
    cancel: &CancelToken,
    progress: &Progress,
) -> Result<Converted> {
    if recipe.out.extension().is_none_or(|extension| !extension.eq_ignore_ascii_case("gguf")) {
        return Err(Error::new(ErrorCode::OptionInvalid, "a GGUF file has a name that ends in .gguf")
            .subject("out")
            .hint("Give the name of a file, such as model.gguf"));
    }
    if recipe.out.exists() && !recipe.dry_run {
        return Err(Error::new(ErrorCode::OutputNotEmpty, "the output file exists")
            .subject(recipe.out.display())
            .hint("Choose another name or remove the file"));
    }
    if checkpoint.compensation()?.is_some() {
        return Err(Error::new(
            ErrorCode::QuantizationUnsupported,
            "a GGUF file has no place for the compensation in eora/",
        )
        .subject(recipe.source.display())
        .hint("Move the folder eora/ away, or convert to another format"));
    }
    let spec = DecoderSpec::of(checkpoint)?;
    let mut name = recipe.out.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".{}.gguf", std::process::id()));
    let path = recipe.out.with_file_name(name);
    let plan = GgufPlan { narrow: recipe.allow_requantize, ..GgufPlan::new(kind) };
    let summary = write_gguf(checkpoint, &plan, &path, cancel, progress)?;
    let scratch = ScratchPath(path);
    let written = Checkpoint::open(&scratch.0)?;
    // A matrix that is embedding and head may be stored under either name.
    let (embedding, head) = (spec.name(spec.family.embedding), spec.family.head);
    let origin = |name: &str| {
        let twin = if name == embedding { head } else { embedding };
        // The written file has the full names of a checkpoint that leaves out the first part of them.
        let bare = spec.family.bare_prefix.filter(|_| spec.bare).and_then(|prefix| name.strip_prefix(prefix));
        let name = bare.unwrap_or(name);
        let candidates = [name, twin].into_iter().take(if name == embedding || name == head { 2 } else { 1 });
        let found = candidates.into_iter().find(|name| checkpoint.has_linear(name));
        found.map(str::to_owned).ok_or_else(|| {
            Error::new(ErrorCode::Internal, "a matrix was written that the source does not have").subject(name)
        })
    };
    let matrices = written.tensors().filter(|tensor| tensor.shape.len() == 2);
    let names: Vec<(String, String)> = matrices
        .filter_map(|tensor| tensor.name.strip_suffix(".weight"))
        .map(|name| Ok((name.to_owned(), origin(name)?)))
        .collect::<Result<_>>()?;
    progress.begin("compare", names.len() as u64);
    let mut linears = Vec::with_capacity(names.len());
    for (name, origin) in names {
        cancel.check()?;
        progress.at("compare", name.clone());
        let after = written.linear(&name)?.matrix;
        let is_plain = !checkpoint.rows_are_outputs() && !checkpoint.is_quantized(&origin);
        let turned = spec.family.transposed && is_plain && origin.starts_with(spec.name(spec.family.blocks));
        let before = match turned {
            // No Linear to the checkpoint, which knows nothing of families: its bias belongs to the columns.
            true => checkpoint.dense(&format!("{origin}.weight"))?.transposed().to_f32(),
            false => checkpoint.linear(&origin)?.matrix.to_f32(),
        };
        let error = relative_error(&before, &after.to_f32());
        let bits = match &after {
            WeightMatrix::Dense(matrix) => matrix.element_type().bits() as u8,
            WeightMatrix::Quantized(matrix) => matrix.bits(),
        };
        let (rows, columns) = (after.rows(), after.columns());
        linears.push(ConvertedLinear {
            name,
            rows,
            columns,
            bits,
            exact: error.is_none(),
            error: error.unwrap_or(0.0),
        });
        progress.advance(1);
    }
    if recipe.dry_run {
        return Ok(Converted { linears, bytes: 0, notices: summary.notices });
    }
    if !recipe.allow_requantize {
        check_exact(&linears, recipe)?;
    }
    std::fs::rename(&scratch.0, &recipe.out).map_err(|error| {
        Error::io(ErrorCode::OutputUnwritable, &recipe.out, &error).hint("Check that the folder is writable")
    })?;
    Ok(Converted { linears, bytes: summary.bytes, notices: summary.notices })
}

/// The one grid of all Linears, for formats without exceptions.
#[derive(Clone, Copy)]
struct UniformGrid {
    group_size: GroupSize,
    symmetric: bool,
}

/// A file that is removed when it is not given its name.
struct ScratchPath(PathBuf);

impl Drop for ScratchPath {
    fn drop(&mut self) {
        // After the rename there is nothing to remove.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// The matrix on a grid that `format` holds, with the relative error of that; `None` and `None` where it holds the
/// matrix as it is. `uniform` is the grid of all Linears of a format without exceptions.
fn fit(
    matrix: &QuantizedMatrix,
    format: &'static dyn LinearFormat,
    uniform: Option<UniformGrid>,
    recipe: &ConvertRecipe,
) -> Result<(Option<QuantizedMatrix>, Option<f64>)> {
    let form = MatrixForm::of(matrix);
    let same_groups = uniform.is_none_or(|uniform| uniform.group_size == matrix.group_size());
    if form.check(format).is_ok() && same_groups {
        let with_zero_points = matrix.is_symmetric() && uniform.is_some_and(|uniform| !uniform.symmetric);
        if !with_zero_points {
            return Ok((None, None));
        }
        // The same numbers on a grid that says where zero is.
        let parts = matrix.clone().into_parts();
        let zero_points = Some(vec![1 << (parts.bits - 1); parts.scales.len()]);
        return Ok((Some(QuantizedMatrix::new(QuantizedParts { zero_points, ..parts })?), None));
    }
    let options = nearest_grid(matrix, &form, format, uniform, recipe)?;
    let values = matrix.to_f32();
    let dense = DenseMatrix::from_f32(matrix.rows(), matrix.columns(), values);
    let rounded = linear_method("rtn")?.compress(&dense, None, &options, ThreadPool::global())?;
    let error = relative_error(&dense.to_f32(), &rounded.to_f32());
    Ok((Some(rounded), error))
}

/// Options of rounding to the grid nearest to that of `matrix` that `format` holds: as many bits or the next more, the
/// same groups or the next smaller.
fn nearest_grid(
    matrix: &QuantizedMatrix,
    form: &MatrixForm,
    format: &'static dyn LinearFormat,
    uniform: Option<UniformGrid>,
    recipe: &ConvertRecipe,
) -> Result<QuantizeOptions> {
    let given_size =
        recipe.group_size.map(|size| if size == 0 { GroupSize::WholeRow } else { GroupSize::Columns(size) });
    let more = CODE_BITS.into_iter().filter(|&bits| bits > matrix.bits());
    let fewer = CODE_BITS.into_iter().rev().filter(|&bits| bits < matrix.bits());
    let widths: Vec<u8> = match recipe.bits {
        Some(bits) => vec![bits],
        None => std::iter::once(matrix.bits()).chain(more).chain(fewer).collect(),
    };
    let sizes: Vec<GroupSize> = match given_size {
        Some(size) => vec![size],
        None => match uniform {
            Some(uniform) => vec![uniform.group_size],
            None => std::iter::once(matrix.group_size()).chain(GROUP_SIZES).collect(),
        },
    };
    let kinds = match uniform {
        Some(uniform) => vec![uniform.symmetric],
        None => vec![matrix.is_symmetric(), !matrix.is_symmetric()],
    };
    let scale_type = match form.scale_type {
        ElementType::F32 => ElementType::F16,
        stored => stored,
    };
    let mut reason = None;
    for &bits in &widths {
        for &group_size in &sizes {
            for &symmetric in &kinds {
                let options = QuantizeOptions {
                    bits,
                    group_size,
                    symmetric,
                    scale_type,
                    clip: Clip::Weights,
                    ..QuantizeOptions::default()
                };
                options.validate()?;
                let wanted = MatrixForm {
                    bits,
                    group_size,
                    scale_type,
                    smallest_zero_point: (!symmetric).then_some(0),
                    group_index: false,
                    group_axis: GroupAxis::Input,
                    grid: CodeGrid::Integers,
                    ..*form
                };
                match wanted.check(format) {
                    Ok(()) => return Ok(options),
                    Err(error) => reason = reason.or(Some(error)),
                }
            }
        }
    }
    Err(reason.unwrap_or_else(|| Error::new(ErrorCode::Internal, "no grid was tried")))
}

/// ‖b − a‖ / ‖a‖; `None` where they are the same.
fn relative_error(a: &[f32], b: &[f32]) -> Option<f64> {
    let square = |value: f32| f64::from(value) * f64::from(value);
    let difference: f64 = a
        .iter()
        .zip(b)
        .map(|(&a, &b)| {
            let d = f64::from(b) - f64::from(a);
            d * d
        })
        .sum();
    let norm: f64 = a.iter().map(|&value| square(value)).sum();
    (difference > 0.0).then(|| if norm > 0.0 { (difference / norm).sqrt() } else { 1.0 })
}

fn check_exact(linears: &[ConvertedLinear], recipe: &ConvertRecipe) -> Result<()> {
    let inexact: Vec<&ConvertedLinear> = linears.iter().filter(|linear| !linear.exact).collect();
    let Some(worst) = inexact.iter().max_by(|a, b| a.error.total_cmp(&b.error)) else { return Ok(()) };
    let mean = inexact.iter().map(|linear| linear.error).sum::<f64>() / inexact.len() as f64;
    Err(Error::new(
        ErrorCode::ConversionInexact,
        format!(
            "{} of {} Linears do not fit {} as they are; rounding them anew changes their weights by {:.2} % in the mean \
             and {:.2} % at most ({})",
            inexact.len(),
            linears.len(),
            recipe.format,
            100.0 * mean,
            100.0 * worst.error,
            worst.name
        ),
    )
    .subject("format")
    .hint("Allow it with allowRequantize (--allow-requantize), choose a format that holds the grid, or compress the original"))
}
