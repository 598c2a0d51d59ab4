use std::sync::Arc;
use std::time::Instant;

use kintsugi_runtime::{CancelToken, Error, ErrorCode, Result};
use serde::Serialize;

use crate::{Backend, Batch, Model, Sampler, SamplingOptions, Session, StopStrings, TextStream};

/// Rows of one prefill pass; a long prompt is cut so that cancelling stays quick.
const ROWS_PER_PREFILL: usize = 512;

/// How a text is continued.
#[derive(Clone, Debug)]
pub struct GenerateOptions {
    /// Most tokens to generate.
    pub max_tokens: usize,
    /// How a token is picked.
    pub sampling: SamplingOptions,
    /// Texts that end the generation; they are not part of the result.
    pub stop: Vec<String>,
    /// Name of a loaded adapter.
    pub adapter: Option<String>,
    /// Go on after an end token.
    pub ignore_end: bool,
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FinishReason {
    /// `maxTokens` or the context of the model was reached.
    Length,
    /// A stop string appeared.
    Stop,
    /// The model said that the text is over.
    Eos,
}

/// A piece of generated text that is complete in UTF-8 and cannot become part of a stop string.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// May be empty while a character or a possible stop string is held back.
    pub text: String,
    /// The token that was just generated.
    pub token: u32,
}

/// What a generation took.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct GenerationSummary {
    /// Tokens of the prompt.
    pub prompt_tokens: u64,
    /// Tokens generated.
    pub tokens: u64,
    /// `None` while it goes on.
    pub finish_reason: Option<FinishReason>,
    /// Seconds spent on the prompt.
    pub seconds_prefill: f64,
    /// Seconds spent on the tokens after it.
    pub seconds_decode: f64,
}

/// A text in the making; [`Generation::next_piece`] computes one token.
pub struct Generation<B: Backend> {
    model: Arc<Model<B>>,
    session: Session<B>,
    sampler: Sampler,
    stream: TextStream,
    stop: StopStrings,
    options: GenerateOptions,
    adapter: Option<usize>,
    pages: Vec<u32>,
    /// Prompt and generated tokens.
    history: Vec<u32>,
    prompt_tokens: usize,
    /// Most positions that prompt and generated tokens can take.
    sequence_length: usize,
    /// Tokens whose keys and values are in the cache.
    cached: usize,
    finish_reason: Option<FinishReason>,
    seconds_prefill: f64,
    seconds_decode: f64,
}

impl<B: Backend> Generation<B> {
    /// Prepares to continue `prompt`; nothing is computed yet.
    ///
    /// # Errors
    /// `ERR_OPTION_INVALID`, `ERR_ADAPTER_UNKNOWN`, `ERR_TEXT_TOO_SHORT` for an empty prompt,
    /// `ERR_CONTEXT_EXCEEDED` when the prompt leaves no room.
    pub fn new(model: Arc<Model<B>>, prompt: &str, options: GenerateOptions) -> Result<Self> {
        options.sampling.validate()?;
        let adapter = options.adapter.as_deref().map(|name| model.adapter_index(name)).transpose()?;
        let history = model.tokenizer().encode(prompt, true)?;
        if history.is_empty() {
            return Err(Error::new(ErrorCode::TextTooShort, "the prompt is empty")
                .subject("prompt")
                .hint("Give at least one token to continue"));
        }
        let context = model.spec().context_length;
        if history.len() >= context {
            return Err(Error::new(
                ErrorCode::ContextExceeded,
                format!("the prompt has {} tokens, but the context holds {context}", history.len()),
            )
            .subject("prompt")
            .hint("Shorten the prompt"));
        }
        Ok(Generation {
            session: Session::new(&model)?,
            sampler: Sampler::new(options.sampling.clone()),
            stream: TextStream::after(model.tokenizer(), &history)?,
            stop: StopStrings::new(options.stop.clone()),
            adapter,
            pages: Vec::new(),
            prompt_tokens: history.len(),
            sequence_length: history.len().saturating_add(options.max_tokens).min(context),
            cached: 0,
            finish_reason: None,
            seconds_prefill: 0.0,
            seconds_decode: 0.0,
            history,
            options,
            model,
        })
    }

    /// Computes the next token. `None` once the generation is over.
    ///
    /// # Errors
    /// `ERR_CANCELLED`, and what the model reports.
    pub fn next_piece(&mut self, cancel: &CancelToken) -> Result<Option<Piece>> {
        let generated = self.history.len() - self.prompt_tokens;
        if self.finish_reason.is_some() {
            return Ok(None);
        }
        if generated >= self.options.max_tokens || self.history.len() >= self.model.spec().context_length {
            return self.finish(FinishReason::Length);
        }
        let started = Instant::now();
        let prefill = self.cached == 0;
        let token = self.compute(cancel)?;
        let seconds = started.elapsed().as_secs_f64();
        if prefill {
            self.seconds_prefill += seconds;
        } else {
            self.seconds_decode += seconds;
        }
        if !self.options.ignore_end && self.model.spec().end_tokens.contains(&token) {
            return self.finish(FinishReason::Eos);
        }
        self.history.push(token);
        let decoded = self.stream.push(self.model.tokenizer(), token)?;
        let text = self.stop.push(&decoded);
        if self.stop.is_stopped() {
            self.finish_reason = Some(FinishReason::Stop);
        }
        Ok(Some(Piece { text, token }))
    }

    /// What it took so far.
    pub fn summary(&self) -> GenerationSummary {
        GenerationSummary {
            prompt_tokens: self.prompt_tokens as u64,
            tokens: (self.history.len() - self.prompt_tokens) as u64,
            finish_reason: self.finish_reason,
            seconds_prefill: self.seconds_prefill,
            seconds_decode: self.seconds_decode,
        }
    }

    /// Ends with the text that was held back; it belongs to the token that came last.
    fn finish(&mut self, reason: FinishReason) -> Result<Option<Piece>> {
        self.finish_reason = Some(reason);
        let rest = self.stream.finish(self.model.tokenizer())?;
        let mut text = self.stop.push(&rest);
        text.push_str(&self.stop.finish());
        match self.history.last() {
            Some(&token) if !text.is_empty() => Ok(Some(Piece { text, token })),
            _ => Ok(None),
        }
    }

    fn compute(&mut self, cancel: &CancelToken) -> Result<u32> {
        let mut last_rows = 0;
        while self.cached < self.history.len() {
            let rows = (self.history.len() - self.cached).min(ROWS_PER_PREFILL);
            self.session.pages.extend(&mut self.pages, self.cached + rows);
            let mut batch = Batch::new();
            batch.push_part(rows, self.cached, self.pages.clone(), self.adapter, self.sequence_length);
            let tokens = &self.history[self.cached..self.cached + rows];
            self.model.forward(&mut self.session, tokens, &batch, cancel)?;
            self.cached += rows;
            last_rows = rows;
        }
        let mut logits = self.model.logits(&mut self.session, last_rows - 1..last_rows)?.into_owned();
        self.sampler.sample(&mut logits, &self.history)
    }
}
