use kintsugi_checkpoint::{CodeGrid, Gptq, LinearFormat, MatrixForm, PackQuantized, linear_format};
use kintsugi_model::DecoderSpec;
use kintsugi_runtime::{Error, ErrorCode, Result};
use kintsugi_weights::{ElementType, GroupAxis};

use crate::Recipe;

/// The format that is chosen by what it holds.
pub(crate) const AUTO: &str = "auto";

/// The format that `recipe` writes: the one it names, or for `auto` what the fast paths of vLLM accept:
/// compressed-tensors, and GPTQ for 2 and 3 bits where it holds every Linear.
///
/// # Errors
/// `ERR_OPTION_UNKNOWN` for a name that no format has, `ERR_QUANTIZATION_UNSUPPORTED` with the name of the Linear that
/// the format cannot hold.
pub(crate) fn output_format(
    recipe: &Recipe,
    spec: &DecoderSpec,
    stored: ElementType,
) -> Result<&'static dyn LinearFormat> {
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
            let message = format!("the format {} has one width and one group size for all Linears", format.name());
            return Err(Error::new(ErrorCode::QuantizationUnsupported, message)
                .subject(&given.linears)
                .hint("Leave the overrides out, or choose another format"));
        }
        for (name, form) in linears() {
            form.check(format).map_err(|error| error.subject(name))?;
        }
        return Ok(format);
    }
    let gptq: &'static dyn LinearFormat = if recipe.symmetric { &Gptq::V1 } else { &Gptq::V2 };
    let is_narrow = matches!(recipe.bits, 2 | 3);
    let fits = is_narrow && linears().all(|(_, form)| form.check(gptq).is_ok());
    Ok(if fits { gptq } else { &PackQuantized })
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
        group_axis: GroupAxis::Input,
        grid: CodeGrid::Integers,
        scale_type: options.scale_type,
    }
}
