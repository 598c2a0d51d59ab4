use kintsugi_pipeline::{ConvertRecipe, convert as run_conversion};
use napi::Env;
use napi::bindgen_prelude::Object;
use napi_derive::napi;

use crate::compress::bits;
use crate::control::BindingControl;
use crate::job::{spawn, to_json};

/// Options of `convert`; `src/convert.ts` fills in the defaults.
#[napi(object, object_to_js = false)]
pub struct BindingConvertOptions {
    pub source: String,
    pub out: String,
    pub format: String,
    pub allow_requantize: bool,
    pub bits: Option<u32>,
    /// 0 for the whole row.
    pub group_size: Option<u32>,
    pub dry_run: bool,
}

/// Converts the quantized Linears of a checkpoint; the promise gives the report.
#[napi(ts_return_type = "Promise<unknown>")]
pub fn convert<'env>(
    env: &'env Env,
    options: BindingConvertOptions,
    control: &BindingControl,
) -> napi::Result<Object<'env>> {
    let recipe = ConvertRecipe {
        source: options.source.into(),
        out: options.out.into(),
        format: options.format,
        allow_requantize: options.allow_requantize,
        bits: options.bits.map(bits),
        group_size: options.group_size.map(|size| size as usize),
        dry_run: options.dry_run,
    };
    let (cancel, progress) = (control.cancel.clone(), control.progress.clone());
    spawn(env, move || to_json(&run_conversion(&recipe, &cancel, &progress)?))
}
