use std::time::Instant;

use kintsugi_runtime::{CancelToken, Error, ErrorCode, Progress, Result, ThreadPool};
use serde::Serialize;

use crate::head::HeadBuffers;
use crate::perplexity::{
    HEAD_ROWS, WindowLogits, negative_log_likelihood, predicting_rows, token_windows, window_groups,
};
use crate::{Backend, DecoderSpec, Head};

/// How far the predictions of a model are from those of its reference; the protocol of the windows is that of
/// perplexity.
///
/// The divergence of a token is `KL(P ‖ Q) = Σ p · ln(p / q)` in nats, P the distribution of the reference.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Divergence {
    /// Mean over all predicted tokens.
    pub mean_kl_divergence: f64,
    /// The value that 99 % of the tokens do not exceed.
    pub p99_kl_divergence: f64,
    /// Share of tokens for which both models find the same token most likely.
    pub top1_agreement: f64,
    /// Of the model.
    pub perplexity: f64,
    /// Of the reference.
    pub reference_perplexity: f64,
    /// Predicted tokens.
    pub tokens: u64,
    /// Windows.
    pub windows: u64,
    /// Tokens per window.
    pub length: usize,
    /// Wall time.
    pub seconds_total: f64,
}

/// What one predicted token adds.
struct TokenDivergence {
    kl: f64,
    same_top: bool,
    loss: f64,
    reference_loss: f64,
}

/// Goes over `tokens` with both models, which share a vocabulary.
///
/// # Errors
/// `ERR_TEXT_TOO_SHORT`, `ERR_OPTION_INVALID`, `ERR_VALUE_NOT_FINITE` when logits are NaN, `ERR_CANCELLED`.
pub(crate) fn divergence(
    model: &mut dyn WindowLogits,
    reference: &mut dyn WindowLogits,
    tokens: &[u32],
    vocabulary: usize,
    length: usize,
    cancel: &CancelToken,
    progress: &Progress,
) -> Result<Divergence> {
    let started = Instant::now();
    let windows = token_windows(tokens, length)?;
    progress.begin("compare", windows.len() as u64);
    let mut divergences = Vec::new();
    let (mut same_top, mut loss, mut reference_loss) = (0u64, 0.0f64, 0.0f64);
    for group in window_groups(&windows, length) {
        reference.run(group, cancel)?;
        model.run(group, cancel)?;
        for (index, window) in group.iter().enumerate() {
            for rows in predicting_rows(length) {
                cancel.check()?;
                let p = reference.logits(index, rows.clone())?;
                let q = model.logits(index, rows.clone())?;
                let of_rows = ThreadPool::global().map(rows.len(), |row| {
                    let range = row * vocabulary..(row + 1) * vocabulary;
                    TokenDivergence::new(&p[range.clone()], &q[range], window[rows.start + row + 1])
                });
                for token in of_rows {
                    divergences.push(token.kl);
                    same_top += u64::from(token.same_top);
                    loss += token.loss;
                    reference_loss += token.reference_loss;
                }
            }
        }
        progress.advance(group.len() as u64);
    }
    let tokens = divergences.len() as f64;
    let mean = divergences.iter().sum::<f64>() / tokens;
    if !mean.is_finite() {
        return Err(not_finite());
    }
    divergences.sort_by(f64::total_cmp);
    Ok(Divergence {
        mean_kl_divergence: mean,
        p99_kl_divergence: divergences[(divergences.len() * 99).div_ceil(100) - 1],
        top1_agreement: same_top as f64 / tokens,
        perplexity: (loss / tokens).exp(),
        reference_perplexity: (reference_loss / tokens).exp(),
        tokens: divergences.len() as u64,
        windows: windows.len() as u64,
        length,
        seconds_total: started.elapsed().as_secs_f64(),
    })
}

/// The means over rows of `KL(P ‖ Q)` in nats, P and Q what a head predicts from residual streams behind the last block,
/// `[rows, hiddenSize]` each: P from `reference`, Q from each of `others`.
///
/// # Errors
/// `ERR_VALUE_NOT_FINITE` when logits are NaN; what the backend reports, `ERR_CANCELLED`.
pub fn mean_divergences<B: Backend>(
    backend: &B,
    spec: &DecoderSpec,
    head: &Head<B>,
    reference: &[f32],
    others: &[&[f32]],
    cancel: &CancelToken,
) -> Result<Vec<f64>> {
    let (width, vocabulary) = (spec.hidden_size, spec.vocabulary_size);
    let rows = reference.len() / width;
    let mut sums = vec![0.0; others.len()];
    let mut buffers = [HeadBuffers::new(backend, spec)?, HeadBuffers::new(backend, spec)?];
    for first in (0..rows).step_by(HEAD_ROWS) {
        let count = HEAD_ROWS.min(rows - first);
        let [of_reference, of_other] = &mut buffers;
        let upload = |stream: &[f32], buffers: &mut HeadBuffers<B>| {
            backend.upload(&stream[first * width..(first + count) * width], &mut buffers.selected)
        };
        upload(reference, of_reference)?;
        let p = head.logits(backend, count, of_reference)?;
        let row_of = |row: usize| row * vocabulary..(row + 1) * vocabulary;
        let p_log_sums = ThreadPool::global().map(count, |row| top_and_log_sum(&p[row_of(row)]).1);
        for (sum, other) in sums.iter_mut().zip(others) {
            cancel.check()?;
            upload(other, of_other)?;
            let q = head.logits(backend, count, of_other)?;
            let of_rows = ThreadPool::global().map(count, |row| {
                let (p, q) = (&p[row_of(row)], &q[row_of(row)]);
                kl_divergence((p, p_log_sums[row]), (q, top_and_log_sum(q).1))
            });
            *sum += of_rows.iter().sum::<f64>();
        }
    }
    let means: Vec<f64> = sums.into_iter().map(|sum| sum / rows.max(1) as f64).collect();
    if means.iter().all(|mean| mean.is_finite()) { Ok(means) } else { Err(not_finite()) }
}

fn not_finite() -> Error {
    Error::new(ErrorCode::ValueNotFinite, "a model gives logits that are not finite")
        .subject("logits")
        .hint("The weights or activations of the model overflow")
}

/// `KL(P ‖ Q)` of two distributions, each as logits with the logarithm of the sum of their exponentials.
fn kl_divergence((p, p_log_sum): (&[f32], f64), (q, q_log_sum): (&[f32], f64)) -> f64 {
    let terms = p.iter().zip(q).map(|(&p, &q)| {
        let log_p = f64::from(p) - p_log_sum;
        // What cannot come up says nothing.
        let term = log_p.exp() * (log_p - (f64::from(q) - q_log_sum));
        if log_p == f64::NEG_INFINITY { 0.0 } else { term }
    });
    let sum: f64 = terms.sum();
    // Rounding may leave a little less than nothing; NaN stays.
    if sum < 0.0 { 0.0 } else { sum }
}

impl TokenDivergence {
    /// From the logits of the reference (p) and of the model (q), and the token that follows.
    fn new(p: &[f32], q: &[f32], target: u32) -> Self {
        let (p_top, p_log_sum) = top_and_log_sum(p);
        let (q_top, q_log_sum) = top_and_log_sum(q);
        TokenDivergence {
            kl: kl_divergence((p, p_log_sum), (q, q_log_sum)),
            same_top: p_top == q_top,
            loss: negative_log_likelihood(q, target),
            reference_loss: negative_log_likelihood(p, target),
        }
    }
}

/// The most likely token (the lowest of equals), and `ln Σ exp(logit)`.
fn top_and_log_sum(logits: &[f32]) -> (usize, f64) {
    let (mut top, mut largest) = (0, f32::NEG_INFINITY);
    for (token, &logit) in logits.iter().enumerate() {
        if logit > largest {
            (top, largest) = (token, logit);
        }
    }
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - largest).exp()).sum();
    (top, f64::from(largest) + sum.ln())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_does_not_diverge_from_itself_and_a_shift_of_logits_changes_nothing() {
        let p = [1.0f32, -2.0, 0.5, 3.0];
        let shifted = p.map(|logit| logit + 100.0);
        for q in [p, shifted] {
            let token = TokenDivergence::new(&p, &q, 2);
            assert!(token.kl < 1e-12 && token.same_top, "{}", token.kl);
            assert!((token.loss - token.reference_loss).abs() < 1e-12);
        }
    }

    #[test]
    fn logits_that_are_not_finite_show() {
        for q in [[f32::NAN, 0.0], [f32::INFINITY, 0.0]] {
            assert!(!TokenDivergence::new(&[1.0, 0.0], &q, 0).kl.is_finite());
        }
    }

    #[test]
    fn two_coins() {
        // P = (3/4, 1/4), Q = (1/2, 1/2).
        let token = TokenDivergence::new(&[3f32.ln(), 0.0], &[0.0, 0.0], 0);
        assert!((token.kl - (0.75 * 1.5f64.ln() + 0.25 * 0.5f64.ln())).abs() < 1e-7);
        assert!(token.same_top, "of equal logits the lower token counts");
        assert!(!TokenDivergence::new(&[0.0, 1.0], &[0.0, 0.0], 0).same_top);
    }
}
