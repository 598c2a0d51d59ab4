use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kintsugi_checkpoint::{Checkpoint, read_adapter};
use kintsugi_kernels::Precision;
use kintsugi_runtime::{CancelToken, Error, ErrorCode, Progress, Result, nearest};

use crate::divergence::divergence;
use crate::perplexity::{WindowLogits, WindowRunner};

use crate::{
    Backend, CandleBackend, CompensationChoice, CpuBackend, DecoderSpec, Divergence, GenerateOptions, Generation,
    GenerationSummary, Model, Perplexity, Piece,
};

/// Names of the backends.
pub const BACKENDS: [&str; 2] = ["cpu", "candle"];

/// How a checkpoint is loaded.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// One of [`BACKENDS`].
    pub backend: String,
    /// How the `cpu` backend multiplies.
    pub precision: Precision,
    /// Which compensation goes into the products.
    pub compensation: CompensationChoice,
    /// LoRA adapters: name and folder.
    pub adapters: Vec<(String, PathBuf)>,
}

/// A model on whichever backend it was loaded for. Cheap to clone; the weights are shared.
#[derive(Clone)]
pub enum LoadedModel {
    /// Our kernels.
    Cpu(Arc<Model<CpuBackend>>),
    /// The float reference.
    Candle(Arc<Model<CandleBackend>>),
}

macro_rules! on_backend {
    ($loaded:expr, $model:ident => $body:expr) => {
        match $loaded {
            LoadedModel::Cpu($model) => $body,
            LoadedModel::Candle($model) => $body,
        }
    };
}

impl LoadedModel {
    /// Opens and loads a checkpoint folder.
    ///
    /// # Errors
    /// `ERR_OPTION_INVALID` for an unknown backend; what opening, reading and packing report; `ERR_CANCELLED`.
    pub fn load(path: &Path, options: &LoadOptions, cancel: &CancelToken, progress: &Progress) -> Result<Self> {
        let checkpoint = Checkpoint::open(path)?;
        match options.backend.as_str() {
            "cpu" => {
                let backend = CpuBackend::new(options.precision)?;
                load_on(backend, &checkpoint, options, cancel, progress).map(LoadedModel::Cpu)
            }
            "candle" => load_on(CandleBackend, &checkpoint, options, cancel, progress).map(LoadedModel::Candle),
            other => {
                let hint = nearest(other, BACKENDS).map(|name| format!("Did you mean '{name}'?")).unwrap_or_default();
                Err(Error::new(ErrorCode::OptionInvalid, format!("there is no backend '{other}'"))
                    .subject("backend")
                    .hint(hint))
            }
        }
    }

    /// What the model is.
    pub fn spec(&self) -> &DecoderSpec {
        on_backend!(self, model => model.spec())
    }

    /// Name of the backend.
    pub fn backend_name(&self) -> &'static str {
        on_backend!(self, model => model.backend().name())
    }

    /// Names of the loaded adapters.
    pub fn adapters(&self) -> &[String] {
        on_backend!(self, model => model.adapters())
    }

    /// Bytes of the packed weights.
    pub fn memory_bytes(&self) -> usize {
        on_backend!(self, model => model.memory_bytes())
    }

    /// See [`Model::arithmetic`].
    pub fn arithmetic(&self) -> BTreeMap<&'static str, usize> {
        on_backend!(self, model => model.arithmetic())
    }

    /// See [`Model::perplexity`].
    ///
    /// # Errors
    /// As [`Model::perplexity`].
    pub fn perplexity(
        &self,
        text: &str,
        length: usize,
        adapter: Option<&str>,
        cancel: &CancelToken,
        progress: &Progress,
    ) -> Result<Perplexity> {
        on_backend!(self, model => model.perplexity(text, length, adapter, cancel, progress))
    }

    /// How far the predictions of this model are from those of `reference`, in windows of `length` tokens of `text`.
    ///
    /// # Errors
    /// `ERR_TOKENIZER_INVALID` when the two models do not share a vocabulary; otherwise as [`Model::perplexity`].
    pub fn divergence(
        &self,
        reference: &LoadedModel,
        text: &str,
        length: usize,
        adapter: Option<&str>,
        cancel: &CancelToken,
        progress: &Progress,
    ) -> Result<Divergence> {
        progress.at("tokenize", "");
        let tokens = self.encode(text)?;
        let vocabulary = self.spec().vocabulary_size;
        if vocabulary != reference.spec().vocabulary_size || tokens != reference.encode(text)? {
            return Err(Error::new(ErrorCode::TokenizerInvalid, "the two models do not share a tokenizer")
                .subject("reference")
                .hint("Compare a model with the one that it was made from"));
        }
        let mut reference = reference.windows(length, None)?;
        let mut model = self.windows(length, adapter)?;
        divergence(&mut *model, &mut *reference, &tokens, vocabulary, length, cancel, progress)
    }

    fn encode(&self, text: &str) -> Result<Vec<u32>> {
        on_backend!(self, model => model.tokenizer().encode(text, false))
    }

    fn windows(&self, length: usize, adapter: Option<&str>) -> Result<Box<dyn WindowLogits + '_>> {
        on_backend!(self, model => Ok(Box::new(WindowRunner::new(model, length, adapter)?)))
    }

    /// See [`Generation::new`].
    ///
    /// # Errors
    /// As [`Generation::new`].
    pub fn generate(&self, prompt: &str, options: GenerateOptions) -> Result<Box<dyn PieceSource>> {
        on_backend!(self, model => Ok(Box::new(Generation::new(Arc::clone(model), prompt, options)?)))
    }
}

/// A [`Generation`] on any backend.
pub trait PieceSource: Send {
    /// See [`Generation::next_piece`].
    ///
    /// # Errors
    /// As [`Generation::next_piece`].
    fn next_piece(&mut self, cancel: &CancelToken) -> Result<Option<Piece>>;
    /// See [`Generation::summary`].
    fn summary(&self) -> GenerationSummary;
}

impl<B: Backend> PieceSource for Generation<B> {
    fn next_piece(&mut self, cancel: &CancelToken) -> Result<Option<Piece>> {
        Generation::next_piece(self, cancel)
    }

    fn summary(&self) -> GenerationSummary {
        Generation::summary(self)
    }
}

fn load_on<B: Backend>(
    backend: B,
    checkpoint: &Checkpoint,
    options: &LoadOptions,
    cancel: &CancelToken,
    progress: &Progress,
) -> Result<Arc<Model<B>>> {
    let mut model = Model::load(checkpoint, backend, &options.compensation, cancel, progress)?;
    for (name, folder) in &options.adapters {
        cancel.check()?;
        model.add_adapter(name, &read_adapter(folder)?)?;
    }
    Ok(Arc::new(model))
}
