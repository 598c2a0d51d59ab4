use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use kintsugi_calibration::{Calibration, CalibrationBuilder};
use kintsugi_checkpoint::Checkpoint;
use kintsugi_compensate::{HoldOut, OutputSquares};
use kintsugi_kernels::PAGE_POSITIONS;
use kintsugi_model::{Backend, Batch, Block, DecoderSpec, Embedding, RotaryTables, Tap, TapPoint, Taps, Workspace};
use kintsugi_runtime::{CancelToken, Error, ErrorCode, Result, ThreadPool};

use crate::CalibrationTokens;
use crate::activation_buffer::ActivationBuffer;
use crate::calibration_tokens::TokenSpan;
use crate::dense_companion::DenseCompanion;
use crate::output_sums::OutputSums;

/// Rows of one forward pass; several sequences share a pass as long as they fit.
const ROWS_PER_PASS: usize = 1024;

/// The inputs of Linears, by the points that they read at.
#[derive(Clone, Debug, Default)]
pub struct CapturedInputs {
    /// Without points that no token reached.
    pub statistics: BTreeMap<TapPoint, Calibration>,
    /// Of the tokens that take no part in the statistics.
    pub held_out: BTreeMap<TapPoint, HoldOut>,
    /// What the Linears of the block put out for both, by places in [`DecoderSpec::linears`]; without those that have a
    /// bias or are not multiplied in f32.
    pub outputs: BTreeMap<usize, OutputSquares>,
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

/// What a run over a stream tells.
pub(crate) enum Seen<'a, B: Backend> {
    /// It comes to these tokens.
    Pass(Range<usize>),
    /// The inputs of those of them that come to a point; all of them, or the rows of the pass that an expert gets.
    Input(TapPoint, &'a B::Tensor, Option<&'a [usize]>),
    /// What the Linear at a place makes of the last of them that it reads.
    Output(usize, &'a B::Tensor),
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
        Self::empty(spec, text, folder).begin(checkpoint, text)
    }

    /// The same for the dense model beside the stream of the deployed one, whose files may lie in one folder.
    ///
    /// # Errors
    /// As [`CalibrationStream::new`].
    pub fn of_dense_model(
        checkpoint: &Checkpoint,
        spec: &DecoderSpec,
        text: &CalibrationTokens,
        folder: Option<&Path>,
    ) -> Result<Self> {
        Self::empty(spec, text, folder).beside_deployed().begin(checkpoint, text)
    }

    fn begin(mut self, checkpoint: &Checkpoint, text: &CalibrationTokens) -> Result<Self> {
        let embedding = Embedding::read(checkpoint, &self.spec)?;
        let rows_per_pass = self.rows_per_pass();
        for (pass, tokens) in text.tokens().chunks(rows_per_pass).enumerate() {
            let positions: Vec<u32> = (0..tokens.len()).map(|i| (i % text.length()) as u32).collect();
            self.hidden.write(pass * rows_per_pass, &embedding.embed(tokens, &positions)?)?;
        }
        self.hidden.turn();
        Ok(self)
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

    /// What [`CalibrationStream::resume`] is to [`CalibrationStream::new`], for the stream of the dense model.
    ///
    /// # Errors
    /// As [`CalibrationStream::resume`].
    pub fn resume_dense_model(
        spec: &DecoderSpec,
        text: &CalibrationTokens,
        folder: Option<&Path>,
        saved_in: &Path,
        name: &str,
    ) -> Result<Self> {
        let mut stream = Self::empty(spec, text, folder).beside_deployed();
        stream.hidden.restore(saved_in, name)?;
        Ok(stream)
    }

    fn beside_deployed(self) -> Self {
        CalibrationStream { hidden: self.hidden.of_dense_model(), ..self }
    }

    /// A stream of zeros.
    pub(crate) fn empty(spec: &DecoderSpec, text: &CalibrationTokens, folder: Option<&Path>) -> Self {
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
    /// the rows of tokens that take no part in them, and squares of what the Linears there put out.
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
        self.capture_beside(None, backend, block, points, cancel)
    }

    /// The same beside the dense model, if there is one, which is shown every input.
    pub(crate) fn capture_beside(
        &mut self,
        mut dense: Option<&mut DenseCompanion<'_, B>>,
        backend: &B,
        block: &Block<B>,
        points: &[TapPoint],
        cancel: &CancelToken,
    ) -> Result<CapturedInputs> {
        let pool = ThreadPool::global();
        let mut builders: BTreeMap<TapPoint, CalibrationBuilder> = BTreeMap::new();
        let mut held_out: BTreeMap<TapPoint, HeldRows> = BTreeMap::new();
        let mut outputs = OutputSums::new(&self.spec, points, |place| block.is_plain_product(backend, place));
        let spec = self.spec.clone();
        let width_at = |point| width_at(&spec, point).filter(|_| points.contains(&point));
        let seen = places(&self.seen, 0).into_iter().map(|place| (place, false));
        let rest = places(&self.held_out, TokenSpan::sum(&self.seen)).into_iter().map(|place| (place, true));
        for ((range, weight), is_held_out) in seen.chain(rest) {
            if !is_held_out {
                builders.values_mut().for_each(|builder| builder.weigh(weight, pool));
            }
            self.run(backend, block, range, false, cancel, &mut |seen| {
                let (point, tensor, routed) = match seen {
                    Seen::Pass(tokens) => return dense.as_deref_mut().map_or(Ok(()), |dense| dense.run(tokens)),
                    Seen::Input(point, tensor, routed) => (point, tensor, routed),
                    Seen::Output(place, tensor) => {
                        if outputs.adds(place) {
                            let values = backend.download(tensor)?;
                            let add = if is_held_out { OutputSums::hold_out } else { OutputSums::add };
                            add(&mut outputs, place, &values, weight, pool);
                        }
                        return Ok(());
                    }
                };
                let Some(width) = width_at(point) else { return Ok(()) };
                let values = backend.download(tensor)?;
                if is_held_out {
                    refuse_overflow(&values, width)?;
                    if let Some(dense) = &mut dense {
                        dense.hold_out(point, &values, routed, weight)?;
                    }
                    held_out.entry(point).or_default().push(&values, width, weight);
                    return Ok(());
                }
                let builder = builders.entry(point).or_insert_with(|| {
                    let mut builder = CalibrationBuilder::new(width);
                    builder.weigh(weight, pool);
                    builder
                });
                builder.push(&values, pool)?;
                dense.as_mut().map_or(Ok(()), |dense| dense.compare(point, &values, routed, weight))
            })?;
        }
        Ok(CapturedInputs {
            statistics: builders.into_iter().map(|(point, builder)| (point, builder.finish(pool))).collect(),
            held_out: held_out
                .into_iter()
                .filter_map(|(point, rows)| Some((point, rows.finish(width_at(point)?))))
                .collect(),
            outputs: outputs.finish(),
        })
    }

    /// Replaces the stream by what `block` makes of it: the input of the next block.
    ///
    /// # Errors
    /// What the backend reports; `ERR_OUTPUT_UNWRITABLE`, `ERR_CANCELLED`.
    pub fn advance(&mut self, backend: &B, block: &Block<B>, cancel: &CancelToken) -> Result<()> {
        self.run(backend, block, 0..self.tokens(), true, cancel, &mut |_| Ok(()))?;
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
            let pass = self.pass(backend, block, part, values, &mut cache, &mut |_| Ok(()))?;
            found.extend_from_slice(&backend.download(pass)?);
        }
        Ok(found)
    }

    /// Runs the whole block over tokens of the stream, whole sequences, and writes what it makes of it if that is to be
    /// kept. `seen` is told of every pass before it, and of every input in it.
    pub(crate) fn run(
        &mut self,
        backend: &B,
        block: &Block<B>,
        tokens: Range<usize>,
        keep: bool,
        cancel: &CancelToken,
        seen: &mut dyn FnMut(Seen<'_, B>) -> Result<()>,
    ) -> Result<()> {
        let mut cache = backend.kv_cache(block.attention_shape())?;
        let rows_per_pass = self.rows_per_pass();
        for first in tokens.clone().step_by(rows_per_pass) {
            cancel.check()?;
            let range = first..tokens.end.min(first + rows_per_pass);
            let values = self.hidden.read(range.clone())?;
            seen(Seen::Pass(range))?;
            let mut taps = |tap: Tap<'_, B>| {
                seen(match tap {
                    Tap::Input(point, tensor, routed) => Seen::Input(point, tensor, routed),
                    Tap::Output(place, tensor) => Seen::Output(place, tensor),
                })
            };
            self.pass(backend, block, BlockPart::Whole, &values, &mut cache, &mut taps)?;
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

/// Length of the inputs at a point; `None` where no Linear reads.
pub(crate) fn width_at(spec: &DecoderSpec, point: TapPoint) -> Option<usize> {
    spec.linears.iter().find(|linear| linear.slot.tap() == point).map(|linear| linear.columns)
}

/// Refuses inputs of that width that are NaN or infinite.
///
/// # Errors
/// `ERR_VALUE_NOT_FINITE`.
pub(crate) fn refuse_overflow(values: &[f32], width: usize) -> Result<()> {
    let Some(position) = values.iter().position(|value| !value.is_finite()) else { return Ok(()) };
    let message = format!("a token has the value {} at input {}", values[position], position % width);
    Err(Error::new(ErrorCode::ValueNotFinite, message)
        .subject("calibration input")
        .hint("The model overflows on this text; check its weights, or run it in f32 precision"))
}

/// Inputs that are held out, as they come.
#[derive(Default)]
pub(crate) struct HeldRows {
    rows: Vec<f32>,
    weights: Vec<f64>,
}

impl HeldRows {
    /// Adds vectors of length `width` that count `weight` times each.
    pub(crate) fn push(&mut self, rows: &[f32], width: usize, weight: f64) {
        self.rows.extend_from_slice(rows);
        self.weights.resize(self.weights.len() + rows.len() / width.max(1), weight);
    }

    pub(crate) fn finish(self, width: usize) -> HoldOut {
        HoldOut::weighted(width, self.rows, &self.weights)
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
