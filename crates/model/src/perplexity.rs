use std::time::Instant;

use kintsugi_kernels::PAGE_POSITIONS;
use kintsugi_runtime::{CancelToken, Error, ErrorCode, Progress, Result, ThreadPool};
use serde::Serialize;

use crate::{Backend, Batch, Model, Session};

/// Rows of one forward pass; several windows share a pass as long as they fit.
const ROWS_PER_PASS: usize = 1024;
/// Rows whose logits are held at a time.
const ROWS_PER_HEAD: usize = 128;

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
        let adapter = adapter.map(|name| self.adapter_index(name)).transpose()?;
        if length > self.spec().context_length {
            return Err(Error::new(
                ErrorCode::ContextExceeded,
                format!("windows of {length} tokens exceed the context of {}", self.spec().context_length),
            )
            .subject("length")
            .hint("Use a smaller length"));
        }
        progress.at("tokenize", "");
        let tokens = self.tokenizer().encode(text, false)?;
        let windows = token_windows(&tokens, length)?;
        progress.begin("evaluate", windows.len() as u64);

        let mut session = Session::new(self)?;
        let pages_per_window = length.div_ceil(PAGE_POSITIONS);
        let mut total = 0.0f64;
        let mut predicted = 0u64;
        for group in windows.chunks((ROWS_PER_PASS / length).max(1)) {
            let mut batch = Batch::new();
            for index in 0..group.len() {
                let first = (index * pages_per_window) as u32;
                batch.push(length, 0, (first..first + pages_per_window as u32).collect(), adapter);
            }
            self.forward(&mut session, &group.concat(), &batch, cancel)?;
            for (index, window) in group.iter().enumerate() {
                // The last token of a window predicts nothing that is in the window.
                for start in (0..length - 1).step_by(ROWS_PER_HEAD) {
                    cancel.check()?;
                    let end = (start + ROWS_PER_HEAD).min(length - 1);
                    let logits = self.logits(&mut session, index * length + start..index * length + end)?;
                    let vocabulary = self.spec().vocabulary_size;
                    let losses = ThreadPool::global().map(end - start, |row| {
                        let logits = &logits[row * vocabulary..(row + 1) * vocabulary];
                        negative_log_likelihood(logits, window[start + row + 1])
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
fn negative_log_likelihood(logits: &[f32], target: u32) -> f64 {
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
