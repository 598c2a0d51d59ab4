use std::borrow::Cow;
use std::ops::Range;
use std::time::Instant;

use kintsugi_kernels::PAGE_POSITIONS;
use kintsugi_runtime::{CancelToken, Error, ErrorCode, Progress, Result, ThreadPool};
use serde::Serialize;

use crate::{Backend, Batch, Model, Session};

/// Rows of one forward pass; several windows share a pass as long as they fit.
const ROWS_PER_PASS: usize = 1024;
/// Rows whose logits are held at a time.
pub const HEAD_ROWS: usize = 128;

/// How well a model predicts a text; the protocol is written down in `docs/perplexity.md`.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Perplexity {
    /// `exp(meanNegativeLogLikelihood)`.
    pub perplexity: f64,
    /// Mean over all predicted tokens, in nats.
    pub mean_negative_log_likelihood: f64,
    /// Predicted tokens.
    pub tokens: u64,
    /// Windows.
    pub windows: u64,
    /// Tokens per window.
    pub length: usize,
    /// Wall time.
    pub seconds_total: f64,
}

/// Windows of `length` tokens without overlap; the last partial window is dropped.
///
/// # Errors
/// `ERR_OPTION_INVALID` for a length below 2, `ERR_TEXT_TOO_SHORT` when no window is full.
pub fn token_windows(tokens: &[u32], length: usize) -> Result<Vec<&[u32]>> {
    if length < 2 {
        return Err(Error::new(ErrorCode::OptionInvalid, format!("a window of {length} tokens predicts nothing"))
            .subject("length")
            .hint("Use a length of at least 2, usually 512 or 2048"));
    }
    let windows: Vec<&[u32]> = tokens.chunks_exact(length).collect();
    if windows.is_empty() {
        return Err(Error::new(
            ErrorCode::TextTooShort,
            format!("the text has {} tokens, less than one window of {length}", tokens.len()),
        )
        .subject("text")
        .hint("Give a longer text or a smaller length"));
    }
    Ok(windows)
}

/// A model that goes over windows of tokens and gives the logits of their rows.
pub(crate) trait WindowLogits {
    /// Runs the model over windows of equal length.
    ///
    /// # Errors
    /// What the model reports; `ERR_CANCELLED`.
    fn run(&mut self, windows: &[&[u32]], cancel: &CancelToken) -> Result<()>;

    /// Logits `[rows.len(), vocabularySize]` of rows of one of the windows of the last run.
    ///
    /// # Errors
    /// What the model reports.
    fn logits(&mut self, window: usize, rows: Range<usize>) -> Result<Cow<'_, [f32]>>;
}

/// [`WindowLogits`] of a model on its backend.
pub(crate) struct WindowRunner<'a, B: Backend> {
    model: &'a Model<B>,
    session: Session<B>,
    adapter: Option<usize>,
    length: usize,
}

impl<'a, B: Backend> WindowRunner<'a, B> {
    /// For windows of `length` tokens, with an adapter where one is named.
    ///
    /// # Errors
    /// `ERR_ADAPTER_UNKNOWN`, `ERR_CONTEXT_EXCEEDED` for windows beyond the context of the model.
    pub(crate) fn new(model: &'a Model<B>, length: usize, adapter: Option<&str>) -> Result<Self> {
        let adapter = adapter.map(|name| model.adapter_index(name)).transpose()?;
        let context = model.spec().context_length;
        if length > context {
            return Err(Error::new(
                ErrorCode::ContextExceeded,
                format!("windows of {length} tokens exceed the context of {context}"),
            )
            .subject("length")
            .hint("Use a smaller length"));
        }
        Ok(WindowRunner { model, session: Session::new(model)?, adapter, length })
    }
}

impl<B: Backend> WindowLogits for WindowRunner<'_, B> {
    fn run(&mut self, windows: &[&[u32]], cancel: &CancelToken) -> Result<()> {
        let pages = self.length.div_ceil(PAGE_POSITIONS);
        let mut batch = Batch::new();
        for index in 0..windows.len() {
            let first = (index * pages) as u32;
            batch.push(self.length, 0, (first..first + pages as u32).collect(), self.adapter);
        }
        self.model.forward(&mut self.session, &windows.concat(), &batch, cancel)
    }

    fn logits(&mut self, window: usize, rows: Range<usize>) -> Result<Cow<'_, [f32]>> {
        let start = window * self.length;
        self.model.logits(&mut self.session, start + rows.start..start + rows.end)
    }
}

/// Windows that share a pass, and the rows of each whose logits are held at a time.
pub(crate) fn window_groups<'a>(windows: &'a [&'a [u32]], length: usize) -> impl Iterator<Item = &'a [&'a [u32]]> {
    windows.chunks((ROWS_PER_PASS / length).max(1))
}

/// The rows of a window that predict another token of it, in pieces: the last token predicts nothing.
pub(crate) fn predicting_rows(length: usize) -> impl Iterator<Item = Range<usize>> {
    (0..length - 1).step_by(HEAD_ROWS).map(move |start| start..(start + HEAD_ROWS).min(length - 1))
}

impl<B: Backend> Model<B> {
    /// Perplexity of `text` in windows of `length` tokens, optionally with an adapter.
    ///
    /// # Errors
    /// `ERR_TEXT_TOO_SHORT`, `ERR_OPTION_INVALID`, `ERR_CONTEXT_EXCEEDED` for windows beyond the context,
    /// `ERR_ADAPTER_UNKNOWN`, `ERR_CANCELLED`.
    pub fn perplexity(
        &self,
        text: &str,
        length: usize,
        adapter: Option<&str>,
        cancel: &CancelToken,
        progress: &Progress,
    ) -> Result<Perplexity> {
        let started = Instant::now();
        let mut runner = WindowRunner::new(self, length, adapter)?;
        progress.at("tokenize", "");
        let tokens = self.tokenizer().encode(text, false)?;
        let windows = token_windows(&tokens, length)?;
        progress.begin("evaluate", windows.len() as u64);

        let vocabulary = self.spec().vocabulary_size;
        let mut total = 0.0f64;
        let mut predicted = 0u64;
        for group in window_groups(&windows, length) {
            runner.run(group, cancel)?;
            for (index, window) in group.iter().enumerate() {
                for rows in predicting_rows(length) {
                    cancel.check()?;
                    let logits = runner.logits(index, rows.clone())?;
                    let losses = ThreadPool::global().map(rows.len(), |row| {
                        let logits = &logits[row * vocabulary..(row + 1) * vocabulary];
                        negative_log_likelihood(logits, window[rows.start + row + 1])
                    });
                    total += losses.iter().sum::<f64>();
                    predicted += losses.len() as u64;
                }
            }
            progress.advance(group.len() as u64);
        }
        let mean = total / predicted as f64;
        Ok(Perplexity {
            perplexity: mean.exp(),
            mean_negative_log_likelihood: mean,
            tokens: predicted,
            windows: windows.len() as u64,
            length,
            seconds_total: started.elapsed().as_secs_f64(),
        })
    }
}

/// `−log softmax(logits)[target]`, summed in f64.
pub(crate) fn negative_log_likelihood(logits: &[f32], target: u32) -> f64 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - largest).exp()).sum();
    sum.ln() - f64::from(logits[target as usize] - largest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_drop_the_rest_and_refuse_nonsense() {
        let tokens: Vec<u32> = (0..10).collect();
        let windows = token_windows(&tokens, 4).unwrap();
        assert_eq!(windows, [&[0, 1, 2, 3], &[4, 5, 6, 7]]);
        assert_eq!(token_windows(&tokens, 1).unwrap_err().code, ErrorCode::OptionInvalid);
        assert_eq!(token_windows(&tokens, 11).unwrap_err().code, ErrorCode::TextTooShort);
        assert_eq!(token_windows(&[], 2).unwrap_err().code, ErrorCode::TextTooShort);
    }

    #[test]
    fn likelihood_survives_large_logits() {
        let uniform = negative_log_likelihood(&[1e30; 4], 2);
        assert!((uniform - 4f64.ln()).abs() < 1e-12);
        assert!(negative_log_likelihood(&[0.0, f32::NAN], 0).is_nan());
    }
}
