use kintsugi_pipeline::{FoldRecipe, fold_adapter};
use kintsugi_runtime::ThreadPool;
use kintsugi_weights::ElementType;
use napi::Env;
use napi::bindgen_prelude::Object;
use napi_derive::napi;

use crate::control::BindingControl;
use crate::error::{invalid_option, to_napi};
use crate::job::{spawn, to_json};

/// Options of `fold`; `src/fold.ts` fills in the defaults.
#[napi(object, object_to_js = false)]
pub struct BindingFoldOptions {
    pub checkpoint: String,
    pub adapter: String,
    pub out: String,
    pub weight: f64,
    /// `auto`, `bf16`, `f16` or `f32`.
    pub element_type: String,
}

/// Adds an adapter to the weights of a checkpoint; the promise gives the report.
#[napi(ts_return_type = "Promise<unknown>")]
pub fn fold<'env>(env: &'env Env, options: BindingFoldOptions, control: &BindingControl) -> napi::Result<Object<'env>> {
    let (cancel, progress) = (control.cancel.clone(), control.progress.clone());
    let element_type = match options.element_type.as_str() {
        "auto" => None,
        name => Some(
            ElementType::from_name(name)
                .ok_or_else(|| to_napi(&invalid_option("elementType", name, &["auto", "bf16", "f16", "f32"])))?,
        ),
    };
    let recipe = FoldRecipe {
        checkpoint: options.checkpoint.into(),
        adapter: options.adapter.into(),
        weight: options.weight,
        out: options.out.into(),
        element_type,
    };
    spawn(env, move || to_json(&fold_adapter(&recipe, ThreadPool::global(), &cancel, &progress)?))
}
