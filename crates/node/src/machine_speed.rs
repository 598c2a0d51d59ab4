use kintsugi_kernels::{Kernels, SpeedOptions, measure_speed as run_measurement};
use napi::Env;
use napi::bindgen_prelude::Object;
use napi_derive::napi;

use crate::control::BindingControl;
use crate::job::{spawn, to_json};

/// Options of `measureSpeed`; `src/machine-speed.ts` fills in the defaults.
#[napi(object, object_to_js = false)]
pub struct BindingSpeedOptions {
    pub seconds: f64,
    /// Those of the shared pool when not given.
    pub threads: Option<u32>,
    pub rows: Vec<u32>,
}

/// Measures this machine and products on it; the promise gives the report.
#[napi(ts_return_type = "Promise<unknown>")]
pub fn measure_speed<'env>(
    env: &'env Env,
    options: BindingSpeedOptions,
    control: &BindingControl,
) -> napi::Result<Object<'env>> {
    let options = SpeedOptions {
        seconds: options.seconds,
        threads: options.threads.map(|threads| threads as usize),
        rows: options.rows.into_iter().map(|rows| rows as usize).collect(),
    };
    let (cancel, progress) = (control.cancel.clone(), control.progress.clone());
    spawn(env, move || to_json(&run_measurement(&Kernels::selected()?, &options, &cancel, &progress)?))
}
