use std::borrow::Cow;

use kintsugi_checkpoint::Checkpoint;
use kintsugi_kernels::Arithmetic;
use kintsugi_runtime::Result;
use kintsugi_weights::LinearWeight;

use crate::model_weights::{read_final_norm, read_head};
use crate::{Backend, DecoderSpec, Embedding, NormWeight};

/// What makes logits of the residual stream behind the last block: the final norm, the head and a cap.
pub struct Head<B: Backend> {
    norm: B::Norm,
    linear: B::Linear,
    epsilon: f32,
    cap: Option<f32>,
}

/// The buffers of a head, reused by every call.
pub(crate) struct HeadBuffers<B: Backend> {
    /// The rows that are asked for, `[rows, hiddenSize]`.
    pub(crate) selected: B::Tensor,
    normed: B::Tensor,
    logits: B::Tensor,
}

impl<B: Backend> Head<B> {
    /// Reads and packs the head of a checkpoint, of a tied one its embedding.
    ///
    /// # Errors
    /// What reading reports, and packing.
    pub fn read(checkpoint: &Checkpoint, spec: &DecoderSpec, backend: &B) -> Result<Self> {
        let norm = read_final_norm(checkpoint, spec)?;
        let linear = match read_head(checkpoint, spec)? {
            Some(head) => head,
            None => LinearWeight::plain(Embedding::read(checkpoint, spec)?.tokens),
        };
        Self::prepare(backend, spec, &norm, &linear)
    }

    /// Packs the weights of a head.
    ///
    /// # Errors
    /// What the backend reports when a weight cannot be packed.
    pub(crate) fn prepare(backend: &B, spec: &DecoderSpec, norm: &NormWeight, linear: &LinearWeight) -> Result<Self> {
        Ok(Head {
            norm: backend.prepare_norm(norm)?,
            linear: backend.prepare(linear)?,
            epsilon: spec.norm_epsilon,
            cap: spec.logit_cap,
        })
    }

    /// Logits `[rows, vocabularySize]` of so many rows that lie in `buffers`.
    ///
    /// # Errors
    /// What the backend reports.
    pub(crate) fn logits<'a>(
        &self,
        backend: &B,
        rows: usize,
        buffers: &'a mut HeadBuffers<B>,
    ) -> Result<Cow<'a, [f32]>> {
        let HeadBuffers { selected, normed, logits } = buffers;
        backend.set_rows(normed, rows)?;
        backend.set_rows(logits, rows)?;
        backend.norm(selected, &self.norm, self.epsilon, normed)?;
        backend.linear(&self.linear, normed, logits)?;
        if let Some(cap) = self.cap {
            backend.soft_cap(cap, logits)?;
        }
        backend.download(logits)
    }

    /// Bytes of the packed weights.
    pub(crate) fn memory_bytes(&self, backend: &B) -> usize {
        backend.linear_bytes(&self.linear)
    }

    /// What the products are computed in.
    pub(crate) fn arithmetic(&self, backend: &B) -> Arithmetic {
        backend.arithmetic(&self.linear)
    }
}

impl<B: Backend> HeadBuffers<B> {
    /// Empty ones.
    ///
    /// # Errors
    /// What the backend reports when it cannot allocate.
    pub(crate) fn new(backend: &B, spec: &DecoderSpec) -> Result<Self> {
        Ok(HeadBuffers {
            selected: backend.tensor(0, spec.hidden_size)?,
            normed: backend.tensor(0, spec.hidden_size)?,
            logits: backend.tensor(0, spec.vocabulary_size)?,
        })
    }
}
