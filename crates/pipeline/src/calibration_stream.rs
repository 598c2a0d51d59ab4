use std::collections::BTreeMap;

use kintsugi_calibration::{Calibration, CalibrationBuilder};
use kintsugi_kernels::PAGE_POSITIONS;
use kintsugi_model::{Backend, Batch, Block, DecoderSpec, Embedding, RotaryTables, TapPoint, Taps, Workspace};
use kintsugi_runtime::{CancelToken, Result, ThreadPool};

use crate::CalibrationText;

/// Rows of one forward pass; several sequences share a pass as long as they fit.
const ROWS_PER_PASS: usize = 1024;

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
    /// `[tokens, hiddenSize]`: the input of the next block.
    hidden: Vec<f32>,
    width: usize,
    length: usize,
    spec: DecoderSpec,
    workspace: Workspace<B>,
    pass: B::Tensor,
}

impl<B: Backend> CalibrationStream<B> {
    /// Embeds the tokens of `text`.
    ///
    /// # Errors
    /// What the backend reports when it cannot allocate.
    pub fn new(backend: &B, spec: &DecoderSpec, embedding: &Embedding, text: &CalibrationText) -> Result<Self> {
        let positions: Vec<u32> = (0..text.tokens().len()).map(|i| (i % text.length()) as u32).collect();
        Ok(CalibrationStream {
            hidden: embedding.embed(text.tokens(), &positions)?,
            width: spec.hidden_size,
            length: text.length(),
            spec: spec.clone(),
            workspace: Workspace::new(backend, spec)?,
            pass: backend.tensor(0, spec.hidden_size)?,
        })
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.hidden.len() / self.width
    }

    /// `[tokens, hiddenSize]`: the input of the next block.
    pub fn hidden(&self) -> &[f32] {
        &self.hidden
    }

    /// Takes the input of the next block from an earlier run.
    ///
    /// # Panics
    /// When the number of values is not that of the stream.
    pub fn restore(&mut self, hidden: Vec<f32>) {
        assert_eq!(hidden.len(), self.hidden.len(), "a stream keeps its tokens");
        self.hidden = hidden;
    }

    /// Statistics of the inputs that the Linears at `points` read when `block` runs on the stream, which stays as it
    /// is.
    ///
    /// # Errors
    /// `ERR_VALUE_NOT_FINITE` when activations overflow; `ERR_CANCELLED`.
    pub fn capture(
        &mut self,
        backend: &B,
        block: &Block<B>,
        points: &[TapPoint],
        cancel: &CancelToken,
    ) -> Result<BTreeMap<TapPoint, Calibration>> {
        let pool = ThreadPool::global();
        let mut builders: BTreeMap<TapPoint, CalibrationBuilder> = BTreeMap::new();
        let spec = self.spec.clone();
        let width_at = |point| spec.linears.iter().find(|linear| linear.slot.tap() == point).map(|l| l.columns);
        let mut hidden = std::mem::take(&mut self.hidden);
        let ran = self.run(backend, block, BlockPart::Whole, &mut hidden, false, cancel, &mut |point, tensor| {
            if let Some(width) = width_at(point).filter(|_| points.contains(&point)) {
                let values = backend.download(tensor)?;
                builders.entry(point).or_insert_with(|| CalibrationBuilder::new(width)).push(&values, pool)?;
            }
            Ok(())
        });
        self.hidden = hidden;
        ran?;
        Ok(builders.into_iter().map(|(point, builder)| (point, builder.finish(pool))).collect())
    }

    /// Replaces the stream by what `block` makes of it: the input of the next block.
    ///
    /// # Errors
    /// What the backend reports; `ERR_CANCELLED`.
    pub fn advance(&mut self, backend: &B, block: &Block<B>, cancel: &CancelToken) -> Result<()> {
        let mut hidden = std::mem::take(&mut self.hidden);
        let ran = self.run(backend, block, BlockPart::Whole, &mut hidden, true, cancel, &mut |_, _| Ok(()));
        self.hidden = hidden;
        ran
    }

    /// The first sequences of the stream that together have at most `tokens` tokens; at least one.
    pub(crate) fn first_rows(&self, tokens: usize) -> Vec<f32> {
        let rows = (tokens / self.length).max(1) * self.length;
        self.hidden[..self.hidden.len().min(rows * self.width)].to_vec()
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
        let mut rows = rows.to_vec();
        self.run(backend, block, part, &mut rows, true, cancel, &mut |_, _| Ok(()))?;
        Ok(rows)
    }

    fn run(
        &mut self,
        backend: &B,
        block: &Block<B>,
        part: BlockPart,
        hidden: &mut [f32],
        keep: bool,
        cancel: &CancelToken,
        taps: Taps<'_, B>,
    ) -> Result<()> {
        let pages_per_sequence = self.length.div_ceil(PAGE_POSITIONS);
        let mut cache = backend.kv_cache(block.attention_shape())?;
        let rows_per_pass = (ROWS_PER_PASS / self.length).max(1) * self.length;
        for values in hidden.chunks_mut(rows_per_pass * self.width) {
            cancel.check()?;
            let rows = values.len() / self.width;
            let mut batch = Batch::new();
            for sequence in 0..rows / self.length {
                let first = (sequence * pages_per_sequence) as u32;
                batch.push(self.length, 0, (first..first + pages_per_sequence as u32).collect(), None);
            }
            let rotary = RotaryTables::new(backend, &self.spec, &batch)?;
            let (pass, workspace) = (&mut self.pass, &mut self.workspace);
            backend.upload(values, pass)?;
            match part {
                BlockPart::Whole => block.forward(backend, &rotary, &batch, pass, &mut cache, workspace, taps)?,
                BlockPart::Attention => {
                    block.forward_attention(backend, &rotary, &batch, pass, &mut cache, workspace, taps)?;
                }
                BlockPart::Mlp => block.forward_mlp(backend, &batch, pass, workspace, taps)?,
            }
            if keep {
                values.copy_from_slice(&backend.download(&self.pass)?);
            }
        }
        Ok(())
    }
}
