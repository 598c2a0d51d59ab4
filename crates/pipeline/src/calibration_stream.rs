use std::collections::BTreeMap;

use kintsugi_calibration::{Calibration, CalibrationBuilder};
use kintsugi_kernels::PAGE_POSITIONS;
use kintsugi_model::{Backend, Batch, Block, DecoderSpec, Embedding, RotaryTables, TapPoint, Taps, Workspace};
use kintsugi_runtime::{CancelToken, Result, ThreadPool};

use crate::CalibrationText;

/// Rows of one forward pass; several sequences share a pass as long as they fit.
const ROWS_PER_PASS: usize = 1024;

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
        self.run(backend, block, false, cancel, &mut |point, tensor| {
            if let Some(width) = width_at(point).filter(|_| points.contains(&point)) {
                let values = backend.download(tensor)?;
                builders.entry(point).or_insert_with(|| CalibrationBuilder::new(width)).push(&values, pool)?;
            }
            Ok(())
        })?;
        Ok(builders.into_iter().map(|(point, builder)| (point, builder.finish(pool))).collect())
    }

    /// Replaces the stream by what `block` makes of it: the input of the next block.
    ///
    /// # Errors
    /// What the backend reports; `ERR_CANCELLED`.
    pub fn advance(&mut self, backend: &B, block: &Block<B>, cancel: &CancelToken) -> Result<()> {
        self.run(backend, block, true, cancel, &mut |_, _| Ok(()))
    }

    fn run(&mut self, backend: &B, block: &Block<B>, keep: bool, cancel: &CancelToken, tap: Taps<'_, B>) -> Result<()> {
        let pages_per_sequence = self.length.div_ceil(PAGE_POSITIONS);
        let mut cache = backend.kv_cache(block.attention_shape())?;
        let rows_per_pass = (ROWS_PER_PASS / self.length).max(1) * self.length;
        for part in self.hidden.chunks_mut(rows_per_pass * self.width) {
            cancel.check()?;
            let rows = part.len() / self.width;
            let mut batch = Batch::new();
            for sequence in 0..rows / self.length {
                let first = (sequence * pages_per_sequence) as u32;
                batch.push(self.length, 0, (first..first + pages_per_sequence as u32).collect(), None);
            }
            let rotary = RotaryTables::new(backend, &self.spec, &batch)?;
            backend.upload(part, &mut self.pass)?;
            block.forward(backend, &rotary, &batch, &mut self.pass, &mut cache, &mut self.workspace, tap)?;
            if keep {
                part.copy_from_slice(&backend.download(&self.pass)?);
            }
        }
        Ok(())
    }
}
