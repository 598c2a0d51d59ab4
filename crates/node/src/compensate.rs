use kintsugi_model::{CandleBackend, CpuBackend};
use kintsugi_pipeline::{CompensateRecipe, compensate as run_compensation, plan_compensation};
use napi::Env;
use napi::bindgen_prelude::Object;
use napi_derive::napi;

use crate::calibration::BindingCalibration;
use crate::control::BindingControl;
use crate::eora::BindingEora;
use crate::error::{invalid_option, to_napi};
use crate::job::{spawn, to_json};
use crate::model::precision;

/// Options of `compensate`; `src/compensate.ts` fills in the defaults.
#[napi(object, object_to_js = false)]
pub struct BindingCompensateOptions {
    pub original: String,
    pub compressed: String,
    pub out: String,
    pub calibration: BindingCalibration,
    pub eora: BindingEora,
    /// Bytes.
    pub memory: Option<f64>,
    /// `f32` or `exact`; `src/compensate.ts` refuses `fast`.
    pub precision: String,
    /// `cpu` or `candle`.
    pub backend: String,
    pub fresh: bool,
    pub dry_run: bool,
}

/// Compensates a compressed checkpoint; the promise gives the report, or the plan of a dry run.
#[napi(ts_return_type = "Promise<unknown>")]
pub fn compensate<'env>(
    env: &'env Env,
    options: BindingCompensateOptions,
    control: &BindingControl,
) -> napi::Result<Object<'env>> {
    let precision = precision(&options.precision).map_err(|error| to_napi(&error))?;
    let (cancel, progress) = (control.cancel.clone(), control.progress.clone());
    spawn(env, move || {
        let recipe = CompensateRecipe {
            original: options.original.into(),
            compressed: options.compressed.into(),
            out: options.out.into(),
            // Here and not before: it may have to look into the file.
            calibration: options.calibration.recipe(true)?,
            eora: options.eora.recipe()?,
            fresh: options.fresh,
            memory: options.memory.map(|bytes| bytes as u64),
        };
        if options.dry_run {
            return to_json(&plan_compensation(&recipe)?);
        }
        to_json(&match options.backend.as_str() {
            "cpu" => run_compensation(&recipe, &CpuBackend::new(precision)?, &cancel, &progress)?,
            "candle" => run_compensation(&recipe, &CandleBackend, &cancel, &progress)?,
            other => return Err(invalid_option("backend", other, &kintsugi_model::BACKENDS)),
        })
    })
}
