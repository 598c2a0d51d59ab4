use kintsugi_compress::AxisRule;
use kintsugi_model::{CandleBackend, CpuBackend};
use kintsugi_pipeline::{LinearOverride, Recipe, compress as run_compression, plan};
use kintsugi_runtime::Result;
use kintsugi_weights::ElementType;
use napi::Env;
use napi::bindgen_prelude::Object;
use napi_derive::napi;

use crate::calibration::BindingCalibration;
use crate::control::BindingControl;
use crate::eora::BindingEora;
use crate::error::{invalid_option, to_napi};
use crate::job::{spawn, to_json};
use crate::model::precision;

/// Options of `compress`; `src/compress.ts` fills in the defaults.
#[napi(object, object_to_js = false)]
pub struct BindingCompressOptions {
    pub source: String,
    pub out: String,
    pub method: String,
    pub rounding: String,
    pub bits: u32,
    /// Bits per weight.
    pub bit_budget: Option<f64>,
    pub overrides: Vec<BindingLinearOverride>,
    /// Name of a format, or `auto`.
    pub format: String,
    /// 0 for the whole row.
    pub group_size: u32,
    /// `input`, `output` or `adaptive`.
    pub group_axis: String,
    pub symmetric: bool,
    pub clip: bool,
    pub act_order: bool,
    pub static_groups: bool,
    pub damping: f64,
    /// `auto`, `bf16`, `f16` or `f32`.
    pub scale_type: String,
    pub calibration: Option<BindingCalibration>,
    pub save_statistics: Option<String>,
    /// Bytes.
    pub memory: Option<f64>,
    pub eora: Option<BindingEora>,
    /// `f32` or `exact`; `src/compress.ts` refuses `fast`.
    pub precision: String,
    /// `cpu` or `candle`.
    pub backend: String,
    pub fresh: bool,
    pub dry_run: bool,
}

/// Linears whose options differ.
#[napi(object, object_to_js = false)]
pub struct BindingLinearOverride {
    pub linears: String,
    pub bits: Option<u32>,
    /// 0 for the whole row.
    pub group_size: Option<u32>,
}

/// Compresses a checkpoint; the promise gives the report, or the plan of a dry run.
#[napi(ts_return_type = "Promise<unknown>")]
pub fn compress<'env>(
    env: &'env Env,
    options: BindingCompressOptions,
    control: &BindingControl,
) -> napi::Result<Object<'env>> {
    let precision = precision(&options.precision).map_err(|error| to_napi(&error))?;
    let (cancel, progress) = (control.cancel.clone(), control.progress.clone());
    spawn(env, move || {
        // Here and not before: it may have to look into a calibration file.
        let recipe = recipe(&options)?;
        if options.dry_run {
            return to_json(&plan(&recipe)?);
        }
        let report = match options.backend.as_str() {
            "cpu" => run_compression(&recipe, &CpuBackend::new(precision)?, &cancel, &progress)?,
            "candle" => run_compression(&recipe, &CandleBackend, &cancel, &progress)?,
            other => return Err(invalid_option("backend", other, &kintsugi_model::BACKENDS)),
        };
        to_json(&report)
    })
}

/// A width; one that is no width at all is refused like the others.
pub(crate) fn bits(given: u32) -> u8 {
    u8::try_from(given).unwrap_or(u8::MAX)
}

fn recipe(options: &BindingCompressOptions) -> Result<Recipe> {
    let scale_type = match options.scale_type.as_str() {
        "auto" => None,
        name => {
            let valid = ["auto", "bf16", "f16", "f32"];
            Some(ElementType::from_name(name).ok_or_else(|| invalid_option("scaleType", name, &valid))?)
        }
    };
    let eora = options.eora.as_ref().map(BindingEora::recipe).transpose()?;
    Ok(Recipe {
        source: options.source.clone().into(),
        out: options.out.clone().into(),
        method: options.method.clone(),
        rounding: options.rounding.clone(),
        bits: bits(options.bits),
        bit_budget: options.bit_budget,
        group_axis: AxisRule::from_name(&options.group_axis)
            .ok_or_else(|| invalid_option("groupAxis", &options.group_axis, AxisRule::NAMES))?,
        overrides: options
            .overrides
            .iter()
            .map(|given| LinearOverride {
                linears: given.linears.clone(),
                bits: given.bits.map(bits),
                group_size: given.group_size.map(|size| size as usize),
            })
            .collect(),
        format: options.format.clone(),
        group_size: (options.group_size > 0).then_some(options.group_size as usize),
        symmetric: options.symmetric,
        clip: options.clip,
        act_order: options.act_order,
        static_groups: options.static_groups,
        damping: options.damping,
        scale_type,
        calibration: options.calibration.as_ref().map(|given| given.recipe(eora.is_some())).transpose()?,
        save_statistics: options.save_statistics.as_ref().map(Into::into),
        eora,
        fresh: options.fresh,
        memory: options.memory.map(|bytes| bytes as u64),
    })
}
