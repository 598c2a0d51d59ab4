use kintsugi_runtime::Result;

use crate::{Backend, DecoderSpec, LinearSlot};

/// The buffers of a block's forward pass, made once and reused by every block and batch.
pub struct Workspace<B: Backend> {
    pub(crate) rows: usize,
    pub(crate) normed: B::Tensor,
    /// Where queries, keys and values come from one projection.
    pub(crate) qkv: Option<B::Tensor>,
    pub(crate) q: B::Tensor,
    pub(crate) k: B::Tensor,
    pub(crate) v: B::Tensor,
    pub(crate) attention: B::Tensor,
    pub(crate) projected: B::Tensor,
    /// Where gate and up come from one projection.
    pub(crate) gate_up: Option<B::Tensor>,
    pub(crate) gate: B::Tensor,
    pub(crate) up: B::Tensor,
    pub(crate) activation: B::Tensor,
}

impl<B: Backend> Workspace<B> {
    /// Buffers for the widths of `spec`.
    ///
    /// # Errors
    /// What the backend reports when it cannot allocate.
    pub fn new(backend: &B, spec: &DecoderSpec) -> Result<Self> {
        let tensor = |width| backend.tensor(0, width);
        let fused = |slot: LinearSlot| {
            let linear = spec.linears.iter().find(|linear| linear.slot == slot);
            linear.map(|linear| tensor(linear.rows)).transpose()
        };
        Ok(Workspace {
            rows: 0,
            normed: tensor(spec.hidden_size)?,
            qkv: fused(LinearSlot::QueryKeyValue)?,
            q: tensor(spec.query_width())?,
            k: tensor(spec.kv_width())?,
            v: tensor(spec.kv_width())?,
            attention: tensor(spec.query_width())?,
            projected: tensor(spec.hidden_size)?,
            gate_up: fused(LinearSlot::GateUp)?,
            gate: tensor(spec.intermediate_size)?,
            up: tensor(spec.intermediate_size)?,
            activation: tensor(spec.intermediate_size)?,
        })
    }

    pub(crate) fn set_rows(&mut self, backend: &B, rows: usize) -> Result<()> {
        if rows != self.rows {
            for tensor in [
                &mut self.normed,
                &mut self.q,
                &mut self.k,
                &mut self.v,
                &mut self.attention,
                &mut self.projected,
                &mut self.gate,
                &mut self.up,
                &mut self.activation,
            ] {
                backend.set_rows(tensor, rows)?;
            }
            for tensor in [&mut self.qkv, &mut self.gate_up].into_iter().flatten() {
                backend.set_rows(tensor, rows)?;
            }
            self.rows = rows;
        }
        Ok(())
    }
}
