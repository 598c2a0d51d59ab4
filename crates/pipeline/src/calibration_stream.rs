use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use kintsugi_calibration::{Calibration, CalibrationBuilder};
use kintsugi_checkpoint::Checkpoint;
use kintsugi_compensate::HoldOut;
use kintsugi_kernels::PAGE_POSITIONS;
use kintsugi_model::{Backend, Batch, Block, DecoderSpec, Embedding, RotaryTables, TapPoint, Taps, Workspace};
use kintsugi_runtime::{CancelToken, Error, ErrorCode, Result, ThreadPool};

use crate::CalibrationTokens;
use crate::activation_buffer::ActivationBuffer;
use crate::calibration_tokens::TokenSpan;

/// Rows of one forward pass; several sequences share a pass as long as they fit.
const ROWS_PER_PASS: usize = 1024;

/// The inputs of Linears, by the points that they read at.
#[derive(Clone, Debug, Default)]
pub struct CapturedInputs {
    /// Without points that no token reached.
    pub statistics: BTreeMap<TapPoint, Calibration>,
    /// Of the tokens that take no part in the statistics.
    pub held_out: BTreeMap<TapPoint, HoldOut>,
}

/// What of a block runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BlockPart {
    /// All of it.
    Whole,
    /// Up to the sum behind the attention; not of a parallel block.
    Attention,
    /// From there on; not of a parallel block.
    Mlp,
}

/// The residual stream of all calibration tokens, carried from block to block.
pub struct CalibrationStream<B: Backend> {
    /// The input of the next block.
    hidden: ActivationBuffer,
    length: usize,
    /// Tokens that statistics are taken from, by their sources.
    seen: Vec<TokenSpan>,
    /// Tokens behind them that take no part in statistics.
    held_out: Vec<TokenSpan>,
    spec: DecoderSpec,
    /// Buffers of a forward pass; they go when a block has been captured or left.
    workspace: Option<(Workspace<B>, B::Tensor)>,
}

impl<B: Backend> CalibrationStream<B> {
    /// A stream at the input of the first block: embeds the tokens of `text`. The activations are kept in files of
    /// `folder`, or in memory without one.
    ///
    /// # Errors
    /// `ERR_OUTPUT_UNWRITABLE`; what reading the embedding reports.
    pub fn new(
        checkpoint: &Checkpoint,
        spec: &DecoderSpec,
        text: &CalibrationTokens,
        folder: Option<&Path>,
    ) -> Result<Self> {
        let mut stream = Self::empty(spec, text, folder);
        let embedding = Embedding::read(checkpoint, spec)?;
        let rows_per_pass = stream.rows_per_pass();
        for (pass, tokens) in text.tokens().chunks(rows_per_pass).enumerate() {
            let positions: Vec<u32> = (0..tokens.len()).map(|i| (i % text.length()) as u32).collect();
            stream.hidden.write(pass * rows_per_pass, &embedding.embed(tokens, &positions)?)?;
        }
        stream.hidden.turn();
        Ok(stream)
    }

    /// A stream at the input of the block after those that an earlier run has finished, which it saved in `saved_in`
    /// under `name`.
    ///
    /// # Errors
    /// `ERR_RESUME_MISMATCH` when that is not there or not whole.
    pub fn resume(
        spec: &DecoderSpec,
        text: &CalibrationTokens,
        folder: Option<&Path>,
        saved_in: &Path,
        name: &str,
    ) -> Result<Self> {
        let mut stream = Self::empty(spec, text, folder);
        stream.hidden.restore(saved_in, name)?;
        Ok(stream)
    }

    fn empty(spec: &DecoderSpec, text: &CalibrationTokens, folder: Option<&Path>) -> Self {
        let hidden = ActivationBuffer::new(text.tokens().len(), spec.hidden_size, folder);
        let (seen, held_out) = text.spans();
        CalibrationStream {
            hidden,
            length: text.length(),
            seen: seen.to_vec(),
            held_out: held_out.to_vec(),
            spec: spec.clone(),
            workspace: None,
        }
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.hidden.rows()
    }

    /// Tokens at the end that take no part in statistics.
    pub fn held_out(&self) -> usize {
        TokenSpan::sum(&self.held_out)
    }

    /// Rows of one forward pass over sequences of `length` tokens.
    pub(crate) fn rows_of_a_pass(length: usize) -> usize {
        (ROWS_PER_PASS / length).max(1) * length
    }

    fn rows_per_pass(&self) -> usize {
        Self::rows_of_a_pass(self.length)
    }

    /// Leaves the input of the next block in `folder` for a later run; gives its name there.
    ///
    /// # Errors
    /// `ERR_OUTPUT_UNWRITABLE`.
    pub fn save(&self, folder: &Path) -> Result<String> {
        self.hidden.save(folder)
    }

    /// The inputs that the Linears at `points` read when `block` runs on the stream, which stays as it is: statistics,
    /// and the rows of tokens that take no part in them.
    ///
    /// # Errors
    /// `ERR_VALUE_NOT_FINITE` when activations overflow; `ERR_CANCELLED`.
    pub fn capture(
        &mut self,
        backend: &B,
        block: &Block<B>,
        points: &[TapPoint],
        cancel: &CancelToken,
    ) -> Result<CapturedInputs> {
        let pool = ThreadPool::global();
        let mut builders: BTreeMap<TapPoint, CalibrationBuilder> = BTreeMap::new();
        let mut rows: BTreeMap<TapPoint, (usize, Vec<f32>)> = BTreeMap::new();
        let spec = self.spec.clone();
        let width_at = |point| spec.linears.iter().find(|linear| linear.slot.tap() == point).map(|l| l.columns);
        for (range, weight) in places(&self.seen, 0) {
            builders.values_mut().for_each(|builder| builder.weigh(weight, pool));
            self.run(backend, block, range, false, cancel, &mut |point, tensor| {
                if let Some(width) = width_at(point).filter(|_| points.contains(&point)) {
                    let values = backend.download(tensor)?;
                    let builder = builders.entry(point).or_insert_with(|| {
                        let mut builder = CalibrationBuilder::new(width);
                        builder.weigh(weight, pool);
                        builder
                    });
                    builder.push(&values, pool)?;
                }
                Ok(())
            })?;
        }
        for (range, weight) in places(&self.held_out, TokenSpan::sum(&self.seen)) {
            // Errors are squares: a token with this factor counts that often.
            let factor = weight.sqrt() as f32;
            self.run(backend, block, range, false, cancel, &mut |point, tensor| {
                if let Some(width) = width_at(point).filter(|_| points.contains(&point)) {
                    let values = backend.download(tensor)?;
                    if let Some(position) = values.iter().position(|value| !value.is_finite()) {
                        let message =
                            format!("a token has the value {} at input {}", values[position], position % width);
                        return Err(Error::new(ErrorCode::ValueNotFinite, message)
                            .subject("calibration input")
                            .hint("The model overflows on this text; check its weights, or run it in f32 precision"));
                    }
                    let rows = &mut rows.entry(point).or_insert((width, Vec::new())).1;
                    rows.extend(values.iter().map(|value| value * factor));
                }
                Ok(())
            })?;
        }
        Ok(CapturedInputs {
            statistics: builders.into_iter().map(|(point, builder)| (point, builder.finish(pool))).collect(),
            held_out: rows.into_iter().map(|(point, (width, rows))| (point, HoldOut::new(width, rows))).collect(),
        })
    }

    /// Replaces the stream by what `block` makes of it: the input of the next block.
    ///
    /// # Errors
    /// What the backend reports; `ERR_OUTPUT_UNWRITABLE`, `ERR_CANCELLED`.
    pub fn advance(&mut self, backend: &B, block: &Block<B>, cancel: &CancelToken) -> Result<()> {
        self.run(backend, block, 0..self.tokens(), true, cancel, &mut |_, _| Ok(()))?;
        self.hidden.turn();
        Ok(())
    }

    /// The first sequences of the stream that together have at most `tokens` tokens, as many of each source whatever its
    /// weight; at least one of each.
    ///
    /// # Errors
    /// `ERR_OUTPUT_UNWRITABLE` when they cannot be read.
    pub(crate) fn first_rows(&self, tokens: usize) -> Result<Vec<f32>> {
        let mut rows = Vec::new();
        for range in TokenSpan::sample(&self.seen, tokens, self.length) {
            rows.extend(self.hidden.read(range)?);
        }
        Ok(rows)
    }

    /// What a part of `block` makes of `rows`, whole sequences.
    pub(crate) fn forward(
        &mut self,
        backend: &B,
        block: &Block<B>,
        part: BlockPart,
        rows: &[f32],
        cancel: &CancelToken,
    ) -> Result<Vec<f32>> {
        let mut cache = backend.kv_cache(block.attention_shape())?;
        let mut found = Vec::with_capacity(rows.len());
        for values in rows.chunks(self.rows_per_pass() * self.spec.hidden_size) {
            cancel.check()?;
            let pass = self.pass(backend, block, part, values, &mut cache, &mut |_, _| Ok(()))?;
            found.extend_from_slice(&backend.download(pass)?);
        }
        Ok(found)
    }

    /// Runs the whole block over tokens of the stream, whole sequences, and writes what it makes of it if that is to be kept.
    fn run(
        &mut self,
        backend: &B,
        block: &Block<B>,
        tokens: Range<usize>,
        keep: bool,
        cancel: &CancelToken,
        taps: Taps<'_, B>,
    ) -> Result<()> {
        let mut cache = backend.kv_cache(block.attention_shape())?;
        let rows_per_pass = self.rows_per_pass();
        for first in tokens.clone().step_by(rows_per_pass) {
            cancel.check()?;
            let values = self.hidden.read(first..tokens.end.min(first + rows_per_pass))?;
            self.pass(backend, block, BlockPart::Whole, &values, &mut cache, taps)?;
            if let (true, Some((_, pass))) = (keep, &self.workspace) {
                self.hidden.write(first, &backend.download(pass)?)?;
            }
        }
        self.workspace = None;
        Ok(())
    }

    /// One forward pass over whole sequences.
    fn pass(
        &mut self,
        backend: &B,
        block: &Block<B>,
        part: BlockPart,
        values: &[f32],
        cache: &mut B::KvCache,
        taps: Taps<'_, B>,
    ) -> Result<&B::Tensor> {
        let pages_per_sequence = self.length.div_ceil(PAGE_POSITIONS);
        let mut batch = Batch::new();
        for sequence in 0..values.len() / self.spec.hidden_size / self.length {
            let first = (sequence * pages_per_sequence) as u32;
            batch.push(self.length, 0, (first..first + pages_per_sequence as u32).collect(), None);
        }
        let rotary = RotaryTables::new(backend, &self.spec, &batch)?;
        let (workspace, pass) = match &mut self.workspace {
            Some(buffers) => buffers,
            none => none.insert((Workspace::new(backend, &self.spec)?, backend.tensor(0, self.spec.hidden_size)?)),
        };
        backend.upload(values, pass)?;
        match part {
            BlockPart::Whole => block.forward(backend, &rotary, &batch, pass, cache, workspace, taps)?,
            BlockPart::Attention => {
                block.forward_attention(backend, &rotary, &batch, pass, cache, workspace, taps)?;
            }
            BlockPart::Mlp => block.forward_mlp(backend, &batch, pass, workspace, taps)?,
        }
        Ok(pass)
    }
}

/// Where spans lie that begin at token `first`, and what their tokens count.
fn places(spans: &[TokenSpan], mut first: usize) -> Vec<(Range<usize>, f64)> {
    let place = |span: &TokenSpan| {
        let range = first..first + span.tokens;
        first = range.end;
        (range, span.weight)
    };
    spans.iter().map(place).collect()
}
