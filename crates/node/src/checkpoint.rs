use std::path::PathBuf;

use kintsugi_pipeline::inspect as inspect_checkpoint;
use napi::Env;
use napi::bindgen_prelude::Object;
use napi_derive::napi;

use crate::job::{spawn, to_json};

/// What a checkpoint folder is and what can be done with it.
#[napi(ts_return_type = "Promise<unknown>")]
pub fn inspect(env: &Env, path: String) -> napi::Result<Object<'_>> {
    spawn(env, move || to_json(&inspect_checkpoint(&PathBuf::from(path))?))
}
