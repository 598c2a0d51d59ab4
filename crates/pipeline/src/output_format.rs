use kintsugi_checkpoint::gguf::{GGUF_TYPES, GgufPlan, GgufType};
use kintsugi_checkpoint::{CodeGrid, FORMATS, Gptq, Kintsugi, LinearFormat, MatrixForm, PackQuantized, linear_format};
use kintsugi_compress::AxisRule;
use kintsugi_model::DecoderSpec;
use kintsugi_runtime::{Error, ErrorCode, Result, nearest};
use kintsugi_weights::{CODE_BITS, ElementType, GroupAxis, GroupSize};

use crate::Recipe;

/// The format that is chosen by what it holds.
pub(crate) const AUTO: &str = "auto";
/// What stands before the name of a type of GGUF.
pub(crate) const GGUF: &str = "gguf:";

/// What a compression writes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum OutputFormat {
    /// A folder of Hugging Face with Linears in this layout.
    Folder(&'static dyn LinearFormat),
    /// A folder with a GGUF file: Linears in types that hold their codes as they are, of most of them in this one.
    Gguf(&'static GgufType),
}

impl OutputFormat {
    /// The format of that name, which is not `auto`.
    ///
    /// # Errors
    /// `ERR_OPTION_UNKNOWN`, with the nearest name and all names in the hint.
    pub(crate) fn of_name(name: &str) -> Result<Self> {
        if let Some(kind) = name.strip_prefix(GGUF).and_then(|kind| holding().find(|known| known.name == kind)) {
            return Ok(OutputFormat::Gguf(kind));
        }
        linear_format(name).map(OutputFormat::Folder).map_err(|error| {
            let names: Vec<String> = FORMATS
                .iter()
                .map(|format| format.name().to_owned())
                .chain(holding().map(|kind| format!("{GGUF}{}", kind.name)))
                .collect();
            let closest = nearest(name, names.iter().map(String::as_str)).unwrap_or_default();
            let others = if name.starts_with(GGUF) { "; other types of GGUF: convert afterwards" } else { "" };
            error.hint(format!("Did you mean {closest:?}? Formats are: {}{others}", names.join(", ")))
        })
    }

    /// As options and reports call it.
    pub(crate) fn name(self) -> String {
        match self {
            OutputFormat::Folder(format) => format.name().to_owned(),
            OutputFormat::Gguf(kind) => format!("{GGUF}{}", kind.name),
        }
    }

    /// The layout that Linears have while the job runs, and at its end unless they become GGUF.
    pub(crate) fn layout(self) -> &'static dyn LinearFormat {
        match self {
            OutputFormat::Folder(format) => format,
            OutputFormat::Gguf(_) => &PackQuantized,
        }
    }

    /// What is written at the end of the job in place of the folder; `None` where that stays.
    pub(crate) fn gguf_plan(self, recipe: &Recipe) -> Option<GgufPlan> {
        let OutputFormat::Gguf(kind) = self else { return None };
        let name = recipe.out.file_name().map(|name| name.to_string_lossy().into_owned());
        Some(GgufPlan { name, ..GgufPlan::new(kind) })
    }

    fn takes_exceptions(self) -> bool {
        self.layout().takes_exceptions()
    }

    /// Refuses a matrix of this form where the format cannot hold it.
    ///
    /// # Errors
    /// `ERR_QUANTIZATION_UNSUPPORTED`, without subject.
    fn check(self, form: &MatrixForm) -> Result<()> {
        let kind = match self {
            OutputFormat::Folder(format) => return form.check(format),
            OutputFormat::Gguf(kind) => kind,
        };
        let grids: Vec<(u8, usize)> = holding().filter_map(GgufType::symmetric_grid).collect();
        let is_held = |&(bits, size): &(u8, usize)| {
            form.bits == bits && form.group_size == GroupSize::Columns(size) && !form.is_ragged()
        };
        let plain = form.smallest_zero_point.is_none() && !form.group_index && form.group_axis == GroupAxis::Input;
        if plain && form.scale_type == ElementType::F16 && grids.iter().any(is_held) {
            return Ok(());
        }
        let named: Vec<String> =
            grids.iter().map(|(bits, size)| format!("{bits} bits in groups of {size} inputs")).collect();
        let message = format!(
            "no type of GGUF holds the matrix as it is: {} outputs of {} inputs, {} bits",
            form.rows, form.columns, form.bits
        );
        Err(Error::new(ErrorCode::QuantizationUnsupported, message).hint(format!(
            "{}{} takes {}, symmetric, with f16 scales and whole groups; or compress to another format and convert",
            GGUF,
            kind.name,
            named.join(" or ")
        )))
    }
}

/// The types of GGUF that hold what a compression makes.
fn holding() -> impl Iterator<Item = &'static GgufType> {
    GGUF_TYPES.iter().filter(|kind| kind.is_written() && kind.symmetric_grid().is_some())
}

/// The format that `recipe` writes: the one it names, or for `auto` what the fast paths of vLLM accept:
/// compressed-tensors. GPTQ for 2 and 3 bits, and for a bit budget because its readers take mixed widths with zero
/// points, where it holds every Linear. Groups along the outputs have only our own.
///
/// # Errors
/// `ERR_OPTION_UNKNOWN` for a name that no format has, `ERR_QUANTIZATION_UNSUPPORTED` with the name of the Linear that
/// the format cannot hold.
pub(crate) fn output_format(recipe: &Recipe, spec: &DecoderSpec, stored: ElementType) -> Result<OutputFormat> {
    if recipe.bit_budget.is_some() {
        return format_of_budget(recipe, spec, stored).map(OutputFormat::Folder);
    }
    let linears = || {
        (0..spec.layers).flat_map(|block| {
            spec.linears.iter().map(move |linear| {
                let name = spec.linear_name(block, linear);
                let form = planned_form(recipe, &name, (linear.rows, linear.columns), stored);
                (name, form)
            })
        })
    };
    if recipe.format != AUTO {
        let format = OutputFormat::of_name(&recipe.format)?;
        if let Some(given) = recipe.overrides.first().filter(|_| !format.takes_exceptions()) {
            return Err(one_width(&format.name()).subject(&given.linears));
        }
        for (name, form) in linears() {
            format.check(&form).map_err(|error| error.subject(name))?;
        }
        return Ok(format);
    }
    if recipe.group_axis != AxisRule::Input {
        return Ok(OutputFormat::Folder(&Kintsugi));
    }
    let gptq = gptq(recipe);
    let is_narrow = matches!(recipe.bits, 2 | 3);
    let fits = is_narrow && linears().all(|(_, form)| form.check(gptq).is_ok());
    Ok(OutputFormat::Folder(if fits { gptq } else { &PackQuantized }))
}

/// The GPTQ layout that every reader understands.
fn gptq(recipe: &Recipe) -> &'static dyn LinearFormat {
    if recipe.symmetric { &Gptq::V1 } else { &Gptq::V2 }
}

fn one_width(format: &str) -> Error {
    let message = format!("the format {format} has one width and one group size for all Linears");
    Error::new(ErrorCode::QuantizationUnsupported, message)
        .hint("Leave overrides and bit budgets out, or choose another format")
}

/// The format of Linears whose widths are not known yet: it must hold each at one width at least.
fn format_of_budget(recipe: &Recipe, spec: &DecoderSpec, stored: ElementType) -> Result<&'static dyn LinearFormat> {
    let names = |linear| move |block| spec.linear_name(block, linear);
    let unfit = |format: &dyn LinearFormat| {
        spec.linears.iter().flat_map(|linear| (0..spec.layers).map(names(linear)).map(move |name| (name, linear))).find(
            |(name, linear)| {
                let shape = (linear.rows, linear.columns);
                !CODE_BITS.iter().any(|&bits| holds(format, &recipe.with_bits(bits), name, shape, stored))
            },
        )
    };
    if recipe.format == AUTO {
        let gptq = gptq(recipe);
        return Ok(match recipe.group_axis {
            AxisRule::Input if unfit(gptq).is_none() => gptq,
            AxisRule::Input => &PackQuantized,
            AxisRule::Output | AxisRule::Adaptive => &Kintsugi,
        });
    }
    let OutputFormat::Folder(format) = OutputFormat::of_name(&recipe.format)? else {
        return Err(one_width(&recipe.format).subject("bitBudget"));
    };
    if !format.takes_exceptions() {
        return Err(one_width(format.name()).subject("bitBudget"));
    }
    match unfit(format) {
        Some((name, linear)) => {
            let form = planned_form(recipe, &name, (linear.rows, linear.columns), stored);
            form.check(format).map_err(|error| error.subject(name)).map(|()| format)
        }
        None => Ok(format),
    }
}

/// Whether `format` holds what `recipe` makes of the Linear `name`.
pub(crate) fn holds(
    format: &dyn LinearFormat,
    recipe: &Recipe,
    name: &str,
    shape: (usize, usize),
    stored: ElementType,
) -> bool {
    planned_form(recipe, name, shape, stored).check(format).is_ok()
}

/// What the method will make of a Linear.
fn planned_form(recipe: &Recipe, name: &str, (rows, columns): (usize, usize), stored: ElementType) -> MatrixForm {
    let options = recipe.quantize_options(name, stored);
    MatrixForm {
        rows,
        columns,
        bits: options.bits,
        group_size: options.group_size,
        // A group of positive weights has it.
        smallest_zero_point: (!options.symmetric).then_some(0),
        group_index: recipe.has_group_index(),
        // Whoever may choose the outputs needs a format that holds them.
        group_axis: match options.group_axis {
            AxisRule::Input => GroupAxis::Input,
            AxisRule::Output | AxisRule::Adaptive => GroupAxis::Output,
        },
        grid: CodeGrid::Integers,
        scale_type: options.scale_type,
    }
}
