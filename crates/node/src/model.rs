use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard};

use kintsugi_kernels::Kernels;
use kintsugi_model::{CompensationChoice, LoadOptions, LoadedModel, Precision};
use kintsugi_runtime::Result;
use napi::Env;
use napi::bindgen_prelude::Object;
use napi_derive::napi;

use crate::control::BindingControl;
use crate::error::{disposed, invalid_option, to_napi};
use crate::generation::{BindingGenerateOptions, BindingGeneration};
use crate::job::{spawn, to_json};

/// Options of `loadModel`; `src/model.ts` fills in the defaults.
#[napi(object, object_to_js = false)]
pub struct BindingLoadOptions {
    pub path: String,
    /// `f32`, `exact` or `fast`.
    pub precision: String,
    /// `cpu` or `candle`.
    pub backend: String,
    /// Use the `eora/` factors of the checkpoint.
    pub own_compensation: bool,
    /// Another PEFT folder with factors.
    pub compensation_folder: Option<String>,
    /// Most directions of each.
    pub eora_rank: Option<u32>,
    /// Name and folder of each LoRA adapter.
    pub adapters: HashMap<String, String>,
}

/// A loaded model; the weights live in native memory until `dispose`.
#[napi]
pub struct BindingModel {
    model: Mutex<Option<LoadedModel>>,
    precision: String,
}

/// Loads a checkpoint for running.
#[napi(ts_return_type = "Promise<BindingModel>")]
pub fn load_model<'env>(
    env: &'env Env,
    options: BindingLoadOptions,
    control: &BindingControl,
) -> napi::Result<Object<'env>> {
    let (cancel, progress) = (control.cancel.clone(), control.progress.clone());
    spawn(env, move || {
        // A hash map has no order; adapters are numbered by name so that runs agree.
        let mut adapters: Vec<(String, PathBuf)> =
            options.adapters.into_iter().map(|(name, folder)| (name, folder.into())).collect();
        adapters.sort();
        let load = LoadOptions {
            backend: options.backend,
            precision: precision(&options.precision)?,
            compensation: CompensationChoice {
                own: options.own_compensation,
                folder: options.compensation_folder.map(Into::into),
                rank: options.eora_rank.map(|rank| rank as usize),
            },
            adapters,
        };
        let model = LoadedModel::load(&PathBuf::from(options.path), &load, &cancel, &progress)?;
        Ok(BindingModel { model: Mutex::new(Some(model)), precision: options.precision })
    })
}

#[napi]
impl BindingModel {
    /// What the model is and what it occupies.
    #[napi(ts_return_type = "unknown")]
    pub fn info(&self) -> napi::Result<serde_json::Value> {
        let model = self.model().map_err(|error| to_napi(&error))?;
        let spec = model.spec();
        let level = Kernels::selected().map(|kernels| kernels.level().name()).ok();
        Ok(serde_json::json!({
            "architecture": spec.family.architecture,
            "layers": spec.layers,
            "hiddenSize": spec.hidden_size,
            "vocabularySize": spec.vocabulary_size,
            "contextLength": spec.context_length,
            "linearParameters": spec.linear_parameters(),
            "memoryBytes": model.memory_bytes(),
            "precision": self.precision,
            "arithmetic": model.arithmetic(),
            "backend": model.backend_name(),
            "cpuLevel": level,
            "adapters": model.adapters(),
        }))
    }

    /// Perplexity of a text; the promise gives the figures.
    #[napi(ts_return_type = "Promise<unknown>")]
    pub fn perplexity<'env>(
        &self,
        env: &'env Env,
        text: String,
        length: u32,
        adapter: Option<String>,
        control: &BindingControl,
    ) -> napi::Result<Object<'env>> {
        let model = self.model().map_err(|error| to_napi(&error))?;
        let (cancel, progress) = (control.cancel.clone(), control.progress.clone());
        spawn(env, move || {
            to_json(&model.perplexity(&text, length as usize, adapter.as_deref(), &cancel, &progress)?)
        })
    }

    /// How far the predictions are from those of `reference`; the promise gives the figures.
    #[napi(ts_return_type = "Promise<unknown>")]
    pub fn divergence<'env>(
        &self,
        env: &'env Env,
        reference: &BindingModel,
        text: String,
        length: u32,
        adapter: Option<String>,
        control: &BindingControl,
    ) -> napi::Result<Object<'env>> {
        let model = self.model().map_err(|error| to_napi(&error))?;
        let reference = reference.model().map_err(|error| to_napi(&error))?;
        let (cancel, progress) = (control.cancel.clone(), control.progress.clone());
        spawn(env, move || {
            let adapter = adapter.as_deref();
            to_json(&model.divergence(&reference, &text, length as usize, adapter, &cancel, &progress)?)
        })
    }

    /// Starts to continue `prompt`; each `next` of the result computes one token.
    #[napi]
    pub fn generate(
        &self,
        prompt: String,
        options: BindingGenerateOptions,
        control: &BindingControl,
    ) -> napi::Result<BindingGeneration> {
        let model = self.model().map_err(|error| to_napi(&error))?;
        Ok(BindingGeneration::new(model, prompt, options, control.cancel.clone()))
    }

    /// Releases the weights as soon as no call uses them any more. Idempotent.
    #[napi]
    pub fn dispose(&self) {
        self.lock().take();
    }

    fn model(&self) -> Result<LoadedModel> {
        self.lock().clone().ok_or_else(|| disposed("model"))
    }

    fn lock(&self) -> MutexGuard<'_, Option<LoadedModel>> {
        self.model.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

pub(crate) fn precision(name: &str) -> Result<Precision> {
    match name {
        "f32" => Ok(Precision::F32),
        "exact" => Ok(Precision::Exact),
        "fast" => Ok(Precision::Fast),
        other => Err(invalid_option("precision", other, &["f32", "exact", "fast"])),
    }
}
