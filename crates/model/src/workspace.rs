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
    /// Of the MLP that every row goes through.
    pub(crate) mlp: Option<MlpBuffers<B>>,
    pub(crate) experts: Option<ExpertBuffers<B>>,
}

/// Between the input of an MLP and its activation.
pub(crate) struct MlpBuffers<B: Backend> {
    /// Where gate and up come from one projection.
    pub(crate) gate_up: Option<B::Tensor>,
    pub(crate) gate: B::Tensor,
    pub(crate) up: B::Tensor,
    pub(crate) activation: B::Tensor,
}

/// Of a mixture of experts.
pub(crate) struct ExpertBuffers<B: Backend> {
    /// `[rows, experts]`
    pub(crate) router: B::Tensor,
    /// `[rows, 1]`
    pub(crate) shared_gate: B::Tensor,
    /// The rows that reach one expert.
    pub(crate) input: B::Tensor,
    pub(crate) mlp: MlpBuffers<B>,
    pub(crate) output: B::Tensor,
}

impl<B: Backend> Workspace<B> {
    /// Buffers for the widths of `spec`.
    ///
    /// # Errors
    /// What the backend reports when it cannot allocate.
    pub fn new(backend: &B, spec: &DecoderSpec) -> Result<Self> {
        let tensor = |width| backend.tensor(0, width);
        let outputs =
            |slot: LinearSlot| spec.linears.iter().find(|linear| linear.slot == slot).map(|linear| linear.rows);
        let has_mlp = outputs(LinearSlot::Down).is_some();
        let experts = spec.experts.as_ref().map(|experts| {
            Ok(ExpertBuffers {
                router: tensor(experts.count)?,
                shared_gate: tensor(1)?,
                input: tensor(spec.hidden_size)?,
                mlp: MlpBuffers::new(backend, experts.width, None)?,
                output: tensor(spec.hidden_size)?,
            })
        });
        Ok(Workspace {
            rows: 0,
            normed: tensor(spec.hidden_size)?,
            qkv: outputs(LinearSlot::QueryKeyValue).map(tensor).transpose()?,
            q: tensor(spec.query_width())?,
            k: tensor(spec.kv_width())?,
            v: tensor(spec.kv_width())?,
            attention: tensor(spec.query_width())?,
            projected: tensor(spec.hidden_size)?,
            mlp: has_mlp
                .then(|| MlpBuffers::new(backend, spec.intermediate_size, outputs(LinearSlot::GateUp)))
                .transpose()?,
            experts: experts.transpose()?,
        })
    }

    pub(crate) fn set_rows(&mut self, backend: &B, rows: usize) -> Result<()> {
        if rows == self.rows {
            return Ok(());
        }
        for tensor in
            [&mut self.normed, &mut self.q, &mut self.k, &mut self.v, &mut self.attention, &mut self.projected]
                .into_iter()
                .chain(&mut self.qkv)
        {
            backend.set_rows(tensor, rows)?;
        }
        if let Some(mlp) = &mut self.mlp {
            mlp.set_rows(backend, rows)?;
        }
        if let Some(experts) = &mut self.experts {
            backend.set_rows(&mut experts.router, rows)?;
            backend.set_rows(&mut experts.shared_gate, rows)?;
        }
        self.rows = rows;
        Ok(())
    }
}

impl<B: Backend> MlpBuffers<B> {
    fn new(backend: &B, width: usize, fused: Option<usize>) -> Result<Self> {
        let tensor = |width| backend.tensor(0, width);
        Ok(MlpBuffers {
            gate_up: fused.map(tensor).transpose()?,
            gate: tensor(width)?,
            up: tensor(width)?,
            activation: tensor(width)?,
        })
    }

    fn set_rows(&mut self, backend: &B, rows: usize) -> Result<()> {
        for tensor in [&mut self.gate, &mut self.up, &mut self.activation].into_iter().chain(&mut self.gate_up) {
            backend.set_rows(tensor, rows)?;
        }
        Ok(())
    }
}

impl<B: Backend> ExpertBuffers<B> {
    /// Makes room for the rows that reach one expert.
    pub(crate) fn set_expert_rows(&mut self, backend: &B, rows: usize) -> Result<()> {
        backend.set_rows(&mut self.input, rows)?;
        backend.set_rows(&mut self.output, rows)?;
        self.mlp.set_rows(backend, rows)
    }
}
