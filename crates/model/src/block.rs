use kintsugi_runtime::Result;

use crate::{AttentionShape, Backend, Batch, BlockWeights, DecoderSpec, LinearSlot, TapPoint, Workspace};

/// Sees the input of the Linears at each tap point of a block.
pub type Taps<'a, B> = &'a mut dyn FnMut(TapPoint, &<B as Backend>::Tensor) -> Result<()>;

/// One decoder block, ready to run.
pub struct Block<B: Backend> {
    linears: [B::Linear; 7],
    attention_norm: B::Norm,
    mlp_norm: B::Norm,
    shape: AttentionShape,
    epsilon: f32,
    /// Updates that requests may ask for, by adapter and slot.
    adapters: Vec<[Option<B::LowRank>; 7]>,
}

impl<B: Backend> Block<B> {
    /// Packs the weights of one block.
    ///
    /// # Errors
    /// What the backend reports when a weight cannot be packed.
    pub fn prepare(backend: &B, spec: &DecoderSpec, weights: &BlockWeights) -> Result<Self> {
        let mut linears = Vec::with_capacity(7);
        for weight in &weights.linears {
            linears.push(backend.prepare(weight)?);
        }
        let Ok(linears) = <[B::Linear; 7]>::try_from(linears) else { unreachable!("seven weights were prepared") };
        Ok(Block {
            linears,
            attention_norm: backend.prepare_norm(&weights.attention_norm)?,
            mlp_norm: backend.prepare_norm(&weights.mlp_norm)?,
            shape: AttentionShape { heads: spec.heads, kv_heads: spec.kv_heads, head_dim: spec.head_dim },
            epsilon: spec.norm_epsilon,
            adapters: Vec::new(),
        })
    }

    /// Exchanges one Linear, for example for its compressed form.
    pub fn replace(&mut self, slot: LinearSlot, linear: B::Linear) {
        self.linears[slot.index()] = linear;
    }

    /// Adds the updates of one more adapter; its index is the number of adapters before it.
    pub fn push_adapter(&mut self, updates: [Option<B::LowRank>; 7]) {
        self.adapters.push(updates);
    }

    /// Shape of the attention, which the KV cache needs.
    pub fn attention_shape(&self) -> AttentionShape {
        self.shape
    }

    /// Bytes of the packed weights.
    pub fn memory_bytes(&self, backend: &B) -> usize {
        self.linears.iter().map(|linear| backend.linear_bytes(linear)).sum()
    }

    /// One pass over `hidden` `[rows, hiddenSize]`, in place; `taps` sees the input of every Linear.
    ///
    /// Prefill and decode, one sequence and many, calibration and serving are all this call.
    ///
    /// # Errors
    /// What the backend or a tap reports; `hidden` is then unspecified.
    pub fn forward(
        &self,
        backend: &B,
        rotary: &B::Rotary,
        batch: &Batch,
        hidden: &mut B::Tensor,
        cache: &mut B::KvCache,
        workspace: &mut Workspace<B>,
        taps: Taps<'_, B>,
    ) -> Result<()> {
        workspace.set_rows(backend, batch.rows())?;
        let w = workspace;

        backend.rms_norm(hidden, &self.attention_norm, self.epsilon, &mut w.normed)?;
        taps(TapPoint::AttentionInput, &w.normed)?;
        self.linear(backend, LinearSlot::Query, batch, &w.normed, &mut w.q)?;
        self.linear(backend, LinearSlot::Key, batch, &w.normed, &mut w.k)?;
        self.linear(backend, LinearSlot::Value, batch, &w.normed, &mut w.v)?;
        backend.rotate(rotary, batch.positions(), self.shape.heads, &mut w.q)?;
        backend.rotate(rotary, batch.positions(), self.shape.kv_heads, &mut w.k)?;
        backend.attention(self.shape, batch, &w.q, &w.k, &w.v, cache, &mut w.attention)?;
        taps(TapPoint::AttentionOutput, &w.attention)?;
        self.linear(backend, LinearSlot::Output, batch, &w.attention, &mut w.projected)?;
        backend.add_assign(hidden, &w.projected)?;

        backend.rms_norm(hidden, &self.mlp_norm, self.epsilon, &mut w.normed)?;
        taps(TapPoint::MlpInput, &w.normed)?;
        self.linear(backend, LinearSlot::Gate, batch, &w.normed, &mut w.gate)?;
        self.linear(backend, LinearSlot::Up, batch, &w.normed, &mut w.up)?;
        backend.silu_multiply(&w.gate, &w.up, &mut w.activation)?;
        taps(TapPoint::MlpActivation, &w.activation)?;
        self.linear(backend, LinearSlot::Down, batch, &w.activation, &mut w.projected)?;
        backend.add_assign(hidden, &w.projected)
    }

    fn linear(&self, backend: &B, slot: LinearSlot, batch: &Batch, x: &B::Tensor, y: &mut B::Tensor) -> Result<()> {
        backend.linear(&self.linears[slot.index()], x, y)?;
        for segment in batch.segments() {
            let update = segment.adapter.and_then(|adapter| self.adapters[adapter][slot.index()].as_ref());
            if let Some(update) = update {
                backend.add_low_rank(update, segment.rows.clone(), x, y)?;
            }
        }
        Ok(())
    }
}
