use kintsugi_checkpoint::{CodeGrid, Gptq, Kintsugi, LinearFormat, MatrixForm, PackQuantized, linear_format};
use kintsugi_compress::AxisRule;
use kintsugi_model::DecoderSpec;
use kintsugi_runtime::{Error, ErrorCode, Result};
use kintsugi_weights::{CODE_BITS, ElementType, GroupAxis};

use crate::Recipe;

/// The format that is chosen by what it holds.
pub(crate) const AUTO: &str = "auto";

/// The format that `recipe` writes: the one it names, or for `auto` what the fast paths of vLLM accept:
/// compressed-tensors. GPTQ for 2 and 3 bits, and for a bit budget because its readers take mixed widths with zero
/// points, where it holds every Linear. Groups along the outputs have only our own.
///
/// # Errors
/// `ERR_OPTION_UNKNOWN` for a name that no format has, `ERR_QUANTIZATION_UNSUPPORTED` with the name of the Linear that
/// the format cannot hold.
pub(crate) fn output_format(
    recipe: &Recipe,
    spec: &DecoderSpec,
    stored: ElementType,
) -> Result<&'static dyn LinearFormat> {
    if recipe.bit_budget.is_some() {
        return format_of_budget(recipe, spec, stored);
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
        let format = linear_format(&recipe.format)?;
        if let Some(given) = recipe.overrides.first().filter(|_| !format.takes_exceptions()) {
            return Err(one_width(format).subject(&given.linears));
        }
        for (name, form) in linears() {
            form.check(format).map_err(|error| error.subject(name))?;
        }
        return Ok(format);
    }
    if recipe.group_axis != AxisRule::Input {
        return Ok(&Kintsugi);
    }
    let gptq = gptq(recipe);
    let is_narrow = matches!(recipe.bits, 2 | 3);
    let fits = is_narrow && linears().all(|(_, form)| form.check(gptq).is_ok());
    Ok(if fits { gptq } else { &PackQuantized })
}

/// The GPTQ layout that every reader understands.
fn gptq(recipe: &Recipe) -> &'static dyn LinearFormat {
    if recipe.symmetric { &Gptq::V1 } else { &Gptq::V2 }
}

fn one_width(format: &dyn LinearFormat) -> Error {
    let message = format!("the format {} has one width and one group size for all Linears", format.name());
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
    let format = linear_format(&recipe.format)?;
    if !format.takes_exceptions() {
        return Err(one_width(format).subject("bitBudget"));
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
