use std::fs;
use std::path::{Path, PathBuf};

use kintsugi_compress::{
    AxisRule, BlockMethod, Clip, Gptq, LinearMethod, QuantizeOptions, Rtn, block_method, linear_method,
};
use kintsugi_model::{DecoderSpec, TapPoint};
use kintsugi_runtime::{Error, ErrorCode, Result};
use kintsugi_weights::{ElementType, GroupSize};
use serde::Serialize;

use crate::calibration_source::most_tokens;
use crate::output_format::{AUTO, OutputFormat};
use crate::{CalibrationRecipe, CalibrationSource, EoraInputs, EoraRecipe, LinearOverride};

/// What the user asked for.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Recipe {
    /// Folder of the checkpoint.
    pub source: PathBuf,
    /// Folder that is written.
    pub out: PathBuf,
    /// Name of a compression method.
    pub method: String,
    /// AWQ: name of the method that rounds the scaled weights.
    pub rounding: String,
    /// Width of a code: 2, 3, 4, 5, 6 or 8. Means nothing under a bit budget.
    pub bits: u8,
    /// Bits per weight that codes, scales and zero points may take; each Linear gets a width of its own.
    pub bit_budget: Option<f64>,
    /// Weights that share a scale; `null` for the whole row.
    pub group_size: Option<usize>,
    /// Which way they lie.
    pub group_axis: AxisRule,
    /// Linears whose options differ; the first that matches counts.
    pub overrides: Vec<LinearOverride>,
    /// Name of the format of quantized Linears, or `gguf:` and a type of GGUF; `auto` takes what servers read fastest.
    pub format: String,
    /// Symmetric grids have no zero points.
    pub symmetric: bool,
    /// Shrink the range of a group where that lowers its error: of the weights, weighted by the activations where there is
    /// calibration, or with AWQ of the outputs.
    pub clip: bool,
    /// GPTQ: columns by descending second moment.
    pub act_order: bool,
    /// GPTQ: group parameters from the original weights.
    pub static_groups: bool,
    /// GPTQ: share of the mean diagonal that is added to the second moments.
    pub damping: f64,
    /// Type that scales are stored in; `null` takes that of the checkpoint (f16 for f32 checkpoints).
    pub scale_type: Option<ElementType>,
    /// Text that the statistics are taken from.
    pub calibration: Option<CalibrationRecipe>,
    /// Where the statistics of the job are saved for others.
    pub save_statistics: Option<PathBuf>,
    /// Compensation of what compression broke.
    pub eora: Option<EoraRecipe>,
    /// Discard what an interrupted job left instead of going on with it.
    #[serde(skip)]
    pub fresh: bool,
    /// Bytes of memory that the job may take; `None` for what is available. Changes no bit of the output.
    #[serde(skip)]
    pub memory: Option<u64>,
}

impl Recipe {
    /// Round to nearest, with everything else as a job has it that compresses nothing by itself.
    pub(crate) fn rounding_only() -> Self {
        let QuantizeOptions { bits, group_axis, symmetric, act_order, static_groups, damping, .. } =
            QuantizeOptions::default();
        Recipe {
            source: PathBuf::new(),
            out: PathBuf::new(),
            method: Rtn.name().to_owned(),
            rounding: Rtn.name().to_owned(),
            bits,
            bit_budget: None,
            group_size: None,
            group_axis,
            overrides: Vec::new(),
            format: AUTO.to_owned(),
            symmetric,
            clip: false,
            act_order,
            static_groups,
            damping,
            scale_type: None,
            calibration: None,
            save_statistics: None,
            eora: None,
            fresh: false,
            memory: None,
        }
    }

    /// Checks the options against each other.
    ///
    /// # Errors
    /// `ERR_OPTION_INVALID`, naming the option.
    pub fn validate(&self) -> Result<()> {
        self.usual_options(ElementType::F16).validate()?;
        for given in &self.overrides {
            let options = self.options_with(Some(given), ElementType::F16);
            options.validate().map_err(|error| error.subject("overrides"))?;
        }
        if self.format != AUTO {
            OutputFormat::of_name(&self.format)?;
        }
        self.validate_axis()?;
        self.validate_budget()?;
        let method = self.method()?;
        let needs_calibration = method.needs_calibration() || self.block_method().is_some();
        if self.calibration.is_none() && needs_calibration {
            return Err(missing_text(format!("the method '{}' needs calibration text", self.method)));
        }
        if let Some(eora) = &self.eora {
            eora.validate()?;
            if self.calibration.is_none() {
                return Err(missing_text("EoRA needs calibration text".into()));
            }
        }
        self.validate_statistics()?;
        self.calibration.as_ref().map_or(Ok(()), CalibrationRecipe::validate)
    }

    fn validate_axis(&self) -> Result<()> {
        if self.group_axis == AxisRule::Input || self.block_method().is_none() {
            return Ok(());
        }
        let message = format!("the method '{}' scales inputs, and groups along the outputs do not notice", self.method);
        Err(Error::new(ErrorCode::OptionInvalid, message)
            .subject("groupAxis")
            .hint("Use gptq or rtn, or groups along the inputs"))
    }

    fn validate_budget(&self) -> Result<()> {
        let Some(budget) = self.bit_budget else { return Ok(()) };
        let refuse = |message: String, hint: &str| {
            Err(Error::new(ErrorCode::OptionInvalid, message).subject("bitBudget").hint(hint))
        };
        if !(budget.is_finite() && budget > 0.0) {
            return refuse(format!("a budget is a number of bits per weight, not {budget}"), "Use 3.5, for instance");
        }
        if self.passes().is_none() {
            let message = "a bit budget is divided by what rounding does to the outputs of blocks on some text".into();
            return refuse(message, "Give a calibration text, not statistics");
        }
        Ok(())
    }

    fn validate_statistics(&self) -> Result<()> {
        let refuse = |subject: &str, message: String, hint: &str| {
            Err(Error::new(ErrorCode::OptionInvalid, message).subject(subject).hint(hint))
        };
        let (method, folds, given) = (&self.method, self.block_method().is_some(), self.uses_statistics());
        if given && folds {
            let message =
                format!("the method '{method}' judges its scales on activations, which statistics do not have");
            let at = self.calibration.as_ref().and_then(|calibration| {
                let index = calibration.sources.iter().position(CalibrationSource::is_statistics)?;
                Some(calibration.option(index, "file"))
            });
            let subject = at.unwrap_or_default();
            return refuse(&subject, message, "Give the text that the statistics were taken from");
        }
        if given && self.calibration.as_ref().is_some_and(|calibration| calibration.subset) {
            let message = "statistics that were saved cannot be taken again after each group of Linears".to_owned();
            return refuse("calibration.subset", message, "Leave subset out, or give the text");
        }
        if given && self.eora.as_ref().is_some_and(|eora| eora.inputs.is_mixed()) {
            let message =
                "saved statistics are of the inputs of one model, and mixed inputs are pairs of two".to_owned();
            return refuse("eora.inputs", message, "Give the text that the statistics were taken from");
        }
        if self.passes().is_none() && self.eora.as_ref().is_some_and(EoraRecipe::ablates) {
            let message = "an ablation compares predictions on some text, which statistics do not have".to_owned();
            return refuse("eora.rankWeights", message, "Give a calibration text, or the weights outputs");
        }
        let is_dense = self.eora.as_ref().is_some_and(|eora| eora.inputs == EoraInputs::Dense);
        if is_dense && self.calibration.as_ref().is_some_and(|calibration| calibration.subset) {
            let message = "the original model reads the same whatever is compressed before".to_owned();
            return refuse("calibration.subset", message, "Leave subset out, or solve for deployed inputs");
        }
        match (&self.save_statistics, &self.calibration) {
            (None, _) => Ok(()),
            (Some(_), None) => {
                refuse("saveStatistics", "without calibration there are no statistics".into(), "Give calibration")
            }
            (Some(path), Some(calibration)) if calibration.sources.iter().any(|s| is_same_file(path, &s.file)) => {
                let message = "the statistics would take the place of a source of the calibration".to_owned();
                refuse("saveStatistics", message, "Save them under another name")
            }
            (Some(_), Some(calibration)) if given && calibration.sources.len() == 1 => {
                refuse("saveStatistics", "the statistics are saved already".into(), "Copy the file")
            }
            (Some(_), _) if folds => {
                let message = format!("the method '{method}' takes its statistics from blocks that it has rewritten");
                refuse("saveStatistics", message, "Save those of a job with gptq or rtn")
            }
            _ => Ok(()),
        }
    }

    /// How files of statistics call the activations that those of the job are of.
    pub(crate) fn stream_name(&self) -> &'static str {
        self.eora.as_ref().map_or(EoraInputs::Deployed, |eora| eora.inputs).stream_name()
    }

    /// Whether some statistics come from a file.
    pub(crate) fn uses_statistics(&self) -> bool {
        self.calibration.as_ref().is_some_and(|calibration| calibration.statistics().next().is_some())
    }

    /// The calibration, if it runs forward passes.
    pub(crate) fn passes(&self) -> Option<&CalibrationRecipe> {
        self.calibration.as_ref().filter(|calibration| calibration.texts().next().is_some())
    }

    /// Most tokens that calibration runs over: what is asked for, or what the files can hold; at least one sequence of
    /// each.
    pub(crate) fn most_calibration_tokens(&self) -> usize {
        self.passes().map_or(0, |calibration| {
            let length = calibration.length.max(1);
            let of_source = |source: &CalibrationSource| {
                let sequences = source.sequences.saturating_add(source.hold_out);
                sequences.min(most_tokens(source) / length).max(1).saturating_mul(length)
            };
            calibration.texts().map(of_source).fold(0, usize::saturating_add)
        })
    }

    /// Fewest tokens that calibration runs over: one sequence of each source.
    pub(crate) fn least_calibration_tokens(&self) -> usize {
        self.passes().map_or(0, |calibration| calibration.length.saturating_mul(calibration.texts().count()))
    }

    /// The method that turns each Linear into codes.
    ///
    /// # Errors
    /// `ERR_OPTION_INVALID`, with the nearest name.
    pub fn method(&self) -> Result<&'static dyn LinearMethod> {
        match self.block_method() {
            Some(_) => linear_method(&self.rounding).map_err(|error| error.subject("rounding")),
            None => linear_method(&self.method),
        }
    }

    /// The method that rewrites each block before, if the recipe names one.
    pub fn block_method(&self) -> Option<&'static dyn BlockMethod> {
        block_method(&self.method)
    }

    /// What the compression method is told of the Linear `name`; `checkpoint_type` decides the scale type where the
    /// recipe does not.
    pub fn quantize_options(&self, name: &str, checkpoint_type: ElementType) -> QuantizeOptions {
        self.options_with(self.overrides.iter().find(|given| given.matches(name)), checkpoint_type)
    }

    /// What the compression method is told of Linears without override.
    pub fn usual_options(&self, checkpoint_type: ElementType) -> QuantizeOptions {
        self.options_with(None, checkpoint_type)
    }

    fn options_with(&self, given: Option<&LinearOverride>, checkpoint_type: ElementType) -> QuantizeOptions {
        let scale_type = self.scale_type.unwrap_or(match checkpoint_type {
            ElementType::F32 => ElementType::F16,
            stored => stored,
        });
        QuantizeOptions {
            bits: given.and_then(|given| given.bits).unwrap_or(self.bits),
            group_size: given.and_then(LinearOverride::group_size).unwrap_or(self.group_size()),
            group_axis: self.group_axis,
            symmetric: self.symmetric,
            scale_type,
            clip: match (self.clip, self.block_method()) {
                (false, _) => Clip::Never,
                (true, None) => Clip::Weights,
                (true, Some(_)) => Clip::Outputs,
            },
            act_order: self.act_order,
            static_groups: self.static_groups,
            damping: self.damping,
        }
    }

    /// Whether columns may belong to groups that are not runs of neighbours, so that each Linear stores the group of
    /// every column.
    pub fn has_group_index(&self) -> bool {
        let along_inputs = self.group_axis != AxisRule::Output;
        along_inputs && self.solves_gptq() && self.act_order && !self.static_groups && self.group_size.is_some()
    }

    /// The same with another usual width.
    pub(crate) fn with_bits(&self, bits: u8) -> Recipe {
        Recipe { bits, ..self.clone() }
    }

    /// Whether Linears are solved by GPTQ.
    pub(crate) fn solves_gptq(&self) -> bool {
        self.method().is_ok_and(|method| method.name() == Gptq.name())
    }

    /// Tap points whose Linears are compressed before later ones are captured.
    pub(crate) fn stages(&self, spec: &DecoderSpec) -> Vec<Vec<TapPoint>> {
        let stages = spec.tap_stages();
        match &self.calibration {
            Some(calibration) if calibration.subset => stages,
            _ => vec![stages.concat()],
        }
    }

    /// Weights that share a scale.
    pub fn group_size(&self) -> GroupSize {
        self.group_size.map_or(GroupSize::WholeRow, GroupSize::Columns)
    }
}

fn missing_text(message: String) -> Error {
    Error::new(ErrorCode::OptionInvalid, message)
        .subject("calibration.file")
        .hint("Give a text that resembles what the model will read, or saved statistics")
}

/// Whether two paths lead to one file that is there.
pub(crate) fn is_same_file(left: &Path, right: &Path) -> bool {
    match (fs::canonicalize(left), fs::canonicalize(right)) {
        (Ok(left), Ok(right)) => left == right,
        _ => left == right,
    }
}
