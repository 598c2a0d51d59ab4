use std::sync::{Arc, Mutex, MutexGuard};

use kintsugi_model::{GenerateOptions, LoadedModel, PieceSource, SamplingOptions};
use kintsugi_runtime::{CancelToken, Result};
use napi::Env;
use napi::bindgen_prelude::Object;
use napi_derive::napi;

use crate::job::{spawn, to_json};

/// Options of `generate`; `src/model.ts` fills in the defaults.
#[napi(object, object_to_js = false)]
pub struct BindingGenerateOptions {
    pub max_tokens: u32,
    pub temperature: f64,
    pub top_k: u32,
    pub top_p: f64,
    pub min_p: f64,
    pub repetition_penalty: f64,
    pub seed: Option<f64>,
    pub stop: Vec<String>,
    pub adapter: Option<String>,
    pub ignore_eos: bool,
}

/// A piece of generated text.
#[napi(object)]
pub struct BindingPiece {
    /// Complete in UTF-8; may be empty while a character or a possible stop string is held back.
    pub text: String,
    pub token: u32,
}

enum State {
    /// Not begun: the prompt is tokenized off the JavaScript thread, with the first piece.
    Waiting(LoadedModel, String, GenerateOptions),
    Running(Box<dyn PieceSource>),
    /// The beginning failed.
    Failed,
}

/// A text in the making; pull-based, so a slow reader slows the model down and nothing piles up.
#[napi]
pub struct BindingGeneration {
    state: Arc<Mutex<State>>,
    cancel: CancelToken,
}

#[napi]
impl BindingGeneration {
    pub(crate) fn new(
        model: LoadedModel,
        prompt: String,
        options: BindingGenerateOptions,
        cancel: CancelToken,
    ) -> Self {
        let options = GenerateOptions {
            max_tokens: options.max_tokens as usize,
            sampling: SamplingOptions {
                temperature: options.temperature as f32,
                top_k: options.top_k as usize,
                top_p: options.top_p as f32,
                min_p: options.min_p as f32,
                repetition_penalty: options.repetition_penalty as f32,
                seed: options.seed.map(|seed| seed as u64),
            },
            stop: options.stop,
            adapter: options.adapter,
            ignore_end: options.ignore_eos,
        };
        BindingGeneration { state: Arc::new(Mutex::new(State::Waiting(model, prompt, options))), cancel }
    }

    /// The next piece, or `null` when the text is over.
    #[napi(ts_return_type = "Promise<BindingPiece | null>")]
    pub fn next<'env>(&self, env: &'env Env) -> napi::Result<Object<'env>> {
        let (state, cancel) = (Arc::clone(&self.state), self.cancel.clone());
        spawn(env, move || {
            let piece = advance(&mut lock(&state), &cancel)?;
            Ok(piece.map(|piece| BindingPiece { text: piece.text, token: piece.token }))
        })
    }

    /// What it took so far; `null` before the first piece.
    #[napi(ts_return_type = "Promise<unknown>")]
    pub fn summary<'env>(&self, env: &'env Env) -> napi::Result<Object<'env>> {
        let state = Arc::clone(&self.state);
        spawn(env, move || match &*lock(&state) {
            State::Running(generation) => to_json(&generation.summary()),
            State::Waiting(..) | State::Failed => Ok(serde_json::Value::Null),
        })
    }
}

fn advance(state: &mut State, cancel: &CancelToken) -> Result<Option<kintsugi_model::Piece>> {
    if let State::Waiting(..) = state {
        let State::Waiting(model, prompt, options) = std::mem::replace(state, State::Failed) else { unreachable!() };
        *state = State::Running(model.generate(&prompt, options)?);
    }
    match state {
        State::Running(generation) => generation.next_piece(cancel),
        State::Waiting(..) | State::Failed => Ok(None),
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
