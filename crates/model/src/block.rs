use std::ops::Range;

use kintsugi_kernels::{Activation, Arithmetic};
use kintsugi_runtime::{Error, ErrorCode, Result};

use crate::workspace::MlpBuffers;
use crate::{
    AttentionShape, Backend, Batch, BlockWeights, ColumnRuns, DecoderSpec, ExpertSpec, FusedHeads, LinearSlot,
    NormWeight, RotaryTables, TapPoint, Workspace,
};

/// What a pass over a block shows of its Linears.
pub enum Tap<'a, B: Backend> {
    /// What the Linears at a point read: of all rows, or of those that an expert gets.
    Input(TapPoint, &'a B::Tensor, Option<&'a [usize]>),
    /// What the Linear at a place in [`DecoderSpec::linears`] puts out, with its bias: a row for each of the input.
    Output(usize, &'a B::Tensor),
}

/// Sees the inputs and outputs of the Linears of a block, in the order of computation.
pub type Taps<'a, B> = &'a mut dyn FnMut(Tap<'_, B>) -> Result<()>;

/// One decoder block, ready to run.
pub struct Block<B: Backend> {
    /// In the order of [`DecoderSpec::linears`].
    linears: Vec<B::Linear>,
    slots: Vec<LinearSlot>,
    /// Whether a Linear is nothing but the matrix that the block was prepared with: no bias, no low-rank update.
    plain: Vec<bool>,
    attention_norm: B::Norm,
    mlp_norm: B::Norm,
    head_norms: Option<[B::Norm; 2]>,
    branch_norms: Option<[B::Norm; 2]>,
    parallel: bool,
    fused_heads: FusedHeads,
    shape: AttentionShape,
    experts: Option<Experts<B>>,
    activation: Activation,
    mlp_width: usize,
    epsilon: f32,
    /// Updates that requests may ask for, by adapter and Linear.
    adapters: Vec<Vec<Option<B::LowRank>>>,
}

/// What chooses the experts of a block.
struct Experts<B: Backend> {
    spec: ExpertSpec,
    hidden_size: usize,
    router: B::Linear,
    /// Weighs the expert that sees every token.
    shared_gate: Option<B::Linear>,
}

/// Rows of a tensor that run with an adapter.
struct AdaptedRows {
    rows: Range<usize>,
    adapter: usize,
}

impl<B: Backend> Block<B> {
    /// Packs the weights of block `index`.
    ///
    /// # Errors
    /// What the backend reports when a weight cannot be packed.
    pub fn prepare(backend: &B, spec: &DecoderSpec, index: usize, weights: &BlockWeights) -> Result<Self> {
        let mut linears: Vec<B::Linear> =
            weights.linears.iter().map(|weight| backend.prepare(weight)).collect::<Result<_>>()?;
        let tap = |place: usize| spec.linears[place].slot.tap();
        for place in 1..linears.len() {
            let (before, rest) = linears.split_at_mut(place);
            let others = (0..place).filter(|&other| tap(other) == tap(place));
            others.for_each(|other| backend.share_projection(&mut rest[0], &before[other]));
        }
        let two = |norms: &Option<[NormWeight; 2]>| match norms {
            Some([first, second]) => Ok(Some([backend.prepare_norm(first)?, backend.prepare_norm(second)?])),
            None => Ok(None),
        };
        let experts = match (&spec.experts, &weights.router) {
            (Some(experts), Some(router)) => Some(Experts {
                spec: experts.clone(),
                hidden_size: spec.hidden_size,
                router: backend.prepare(router)?,
                shared_gate: weights.shared_gate.as_ref().map(|gate| backend.prepare(gate)).transpose()?,
            }),
            _ => None,
        };
        Ok(Block {
            linears,
            slots: spec.linears.iter().map(|linear| linear.slot).collect(),
            plain: weights.linears.iter().map(|linear| linear.bias.is_none() && linear.low_rank.is_none()).collect(),
            attention_norm: backend.prepare_norm(&weights.attention_norm)?,
            mlp_norm: backend.prepare_norm(&weights.mlp_norm)?,
            head_norms: two(&weights.head_norms)?,
            branch_norms: two(&weights.branch_norms)?,
            parallel: spec.parallel,
            fused_heads: spec.family.fused_heads,
            shape: spec.attention_shape(index),
            experts,
            activation: spec.activation,
            mlp_width: spec.intermediate_size,
            epsilon: spec.norm_epsilon,
            adapters: Vec::new(),
        })
    }

    /// Exchanges the Linear at a place in [`DecoderSpec::linears`], for example for its compressed form.
    pub fn replace(&mut self, index: usize, linear: B::Linear) {
        self.linears[index] = linear;
        self.plain[index] = false;
    }

    /// Adds the updates of one more adapter, in the order of [`DecoderSpec::linears`]; its index is the number of
    /// adapters before it.
    pub fn push_adapter(&mut self, updates: Vec<Option<B::LowRank>>) {
        self.adapters.push(updates);
    }

    /// Shape of the attention, which the KV cache needs.
    pub fn attention_shape(&self) -> AttentionShape {
        self.shape
    }

    /// Bytes of the packed weights.
    pub fn memory_bytes(&self, backend: &B) -> usize {
        self.every_linear().map(|linear| backend.linear_bytes(linear)).sum()
    }

    /// What the products with each Linear are computed in.
    pub fn arithmetic(&self, backend: &B) -> impl Iterator<Item = Arithmetic> {
        self.every_linear().map(|linear| backend.arithmetic(linear))
    }

    /// Whether what the Linear at a place puts out is the product with the matrix that the block was prepared with, in f32,
    /// and nothing else.
    pub fn is_plain_product(&self, backend: &B, place: usize) -> bool {
        self.plain[place] && self.adapters.is_empty() && backend.arithmetic(&self.linears[place]) == Arithmetic::F32
    }

    /// The Linears, and those that choose experts.
    fn every_linear(&self) -> impl Iterator<Item = &B::Linear> {
        let choosers =
            self.experts.iter().flat_map(|experts| std::iter::once(&experts.router).chain(&experts.shared_gate));
        self.linears.iter().chain(choosers)
    }

    /// One pass over `hidden` `[rows, hiddenSize]`, in place; `taps` sees input and output of every Linear.
    ///
    /// Prefill and decode, one sequence and many, calibration and serving are all this call.
    ///
    /// # Errors
    /// What the backend or a tap reports; `hidden` is then unspecified.
    pub fn forward(
        &self,
        backend: &B,
        rotary: &RotaryTables<B>,
        batch: &Batch,
        hidden: &mut B::Tensor,
        cache: &mut B::KvCache,
        workspace: &mut Workspace<B>,
        taps: Taps<'_, B>,
    ) -> Result<()> {
        self.attend(backend, rotary, batch, hidden, cache, workspace, taps)?;
        if self.parallel {
            backend.norm(hidden, &self.mlp_norm, self.epsilon, &mut workspace.normed)?;
        }
        backend.add_assign(hidden, &workspace.projected)?;
        if !self.parallel {
            backend.norm(hidden, &self.mlp_norm, self.epsilon, &mut workspace.normed)?;
        }
        self.add_mlp(backend, batch, hidden, workspace, taps)
    }

    /// The first half of [`Block::forward`]: norm, attention, and the sum with the input. A parallel block has no
    /// halves.
    ///
    /// # Errors
    /// Those of [`Block::forward`].
    pub fn forward_attention(
        &self,
        backend: &B,
        rotary: &RotaryTables<B>,
        batch: &Batch,
        hidden: &mut B::Tensor,
        cache: &mut B::KvCache,
        workspace: &mut Workspace<B>,
        taps: Taps<'_, B>,
    ) -> Result<()> {
        self.attend(backend, rotary, batch, hidden, cache, workspace, taps)?;
        backend.add_assign(hidden, &workspace.projected)
    }

    /// The second half of [`Block::forward`]: norm, MLP, and the sum with its input. A parallel block has no halves.
    ///
    /// # Errors
    /// Those of [`Block::forward`].
    pub fn forward_mlp(
        &self,
        backend: &B,
        batch: &Batch,
        hidden: &mut B::Tensor,
        workspace: &mut Workspace<B>,
        taps: Taps<'_, B>,
    ) -> Result<()> {
        workspace.set_rows(backend, batch.rows())?;
        backend.norm(hidden, &self.mlp_norm, self.epsilon, &mut workspace.normed)?;
        self.add_mlp(backend, batch, hidden, workspace, taps)
    }

    /// What the attention adds to `hidden`, in `workspace.projected`.
    fn attend(
        &self,
        backend: &B,
        rotary: &RotaryTables<B>,
        batch: &Batch,
        hidden: &B::Tensor,
        cache: &mut B::KvCache,
        workspace: &mut Workspace<B>,
        taps: Taps<'_, B>,
    ) -> Result<()> {
        workspace.set_rows(backend, batch.rows())?;
        let w = workspace;
        let adapted = adapted_rows(batch, None);

        backend.norm(hidden, &self.attention_norm, self.epsilon, &mut w.normed)?;
        taps(Tap::Input(TapPoint::AttentionInput, &w.normed, None))?;
        self.project(backend, &adapted, w, taps)?;
        if let Some([query_norm, key_norm]) = &self.head_norms {
            backend.norm_assign(&mut w.q, query_norm, self.epsilon)?;
            backend.norm_assign(&mut w.k, key_norm, self.epsilon)?;
        }
        if let Some(table) = rotary.of(self.shape.scores.window.is_some()) {
            backend.rotate(table, self.shape.head_dim, &mut w.q)?;
            backend.rotate(table, self.shape.head_dim, &mut w.k)?;
        }
        backend.attention(self.shape, batch, &w.q, &w.k, &w.v, cache, &mut w.attention)?;
        taps(Tap::Input(TapPoint::AttentionOutput, &w.attention, None))?;
        self.linear(backend, LinearSlot::Output, &adapted, &w.attention, &mut w.projected, taps)?;
        if let Some([attention_norm, _]) = &self.branch_norms {
            backend.norm_assign(&mut w.projected, attention_norm, self.epsilon)?;
        }
        Ok(())
    }

    /// Adds what the MLP makes of the normed input.
    fn add_mlp(
        &self,
        backend: &B,
        batch: &Batch,
        hidden: &mut B::Tensor,
        w: &mut Workspace<B>,
        taps: Taps<'_, B>,
    ) -> Result<()> {
        let adapted = adapted_rows(batch, None);
        taps(Tap::Input(TapPoint::MlpInput, &w.normed, None))?;
        if let Some(mlp) = &mut w.mlp {
            self.activate(backend, &adapted, &w.normed, mlp, taps)?;
            taps(Tap::Input(TapPoint::MlpActivation, &mlp.activation, None))?;
            self.linear(backend, LinearSlot::Down, &adapted, &mlp.activation, &mut w.projected, taps)?;
        }
        if let Some(experts) = &self.experts {
            self.mix(backend, experts, batch, w, taps)?;
        }
        if let Some([_, mlp_norm]) = &self.branch_norms {
            backend.norm_assign(&mut w.projected, mlp_norm, self.epsilon)?;
        }
        backend.add_assign(hidden, &w.projected)
    }

    /// Queries, keys and values of the normed input.
    fn project(&self, backend: &B, adapted: &[AdaptedRows], w: &mut Workspace<B>, taps: Taps<'_, B>) -> Result<()> {
        let Some(qkv) = &mut w.qkv else {
            let slots = [LinearSlot::Query, LinearSlot::Key, LinearSlot::Value];
            return self.linears(backend, slots, adapted, &w.normed, [&mut w.q, &mut w.k, &mut w.v], taps);
        };
        self.linear(backend, LinearSlot::QueryKeyValue, adapted, &w.normed, qkv, taps)?;
        let AttentionShape { heads, kv_heads, head_dim, .. } = self.shape;
        let [q, k, v] = match self.fused_heads {
            FusedHeads::Apart => {
                let (query, kv) = (heads * head_dim, kv_heads * head_dim);
                [(0, query), (query, kv), (query + kv, kv)].map(|(start, width)| ColumnRuns {
                    start,
                    stride: width,
                    width,
                    count: 1,
                })
            }
            FusedHeads::Together => [0, 1, 2].map(|part| ColumnRuns {
                start: part * head_dim,
                stride: 3 * head_dim,
                width: head_dim,
                count: heads,
            }),
        };
        backend.take_columns(qkv, q, &mut w.q)?;
        backend.take_columns(qkv, k, &mut w.k)?;
        backend.take_columns(qkv, v, &mut w.v)
    }

    /// The activation of the MLP on `x`.
    fn activate(
        &self,
        backend: &B,
        adapted: &[AdaptedRows],
        x: &B::Tensor,
        mlp: &mut MlpBuffers<B>,
        taps: Taps<'_, B>,
    ) -> Result<()> {
        if let Some(gate_up) = &mut mlp.gate_up {
            self.linear(backend, LinearSlot::GateUp, adapted, x, gate_up, taps)?;
            let gate = ColumnRuns { start: 0, stride: self.mlp_width, width: self.mlp_width, count: 1 };
            backend.take_columns(gate_up, gate, &mut mlp.gate)?;
            backend.take_columns(gate_up, ColumnRuns { start: self.mlp_width, ..gate }, &mut mlp.up)?;
            return backend.activate_multiply(self.activation, &mlp.gate, &mlp.up, &mut mlp.activation);
        }
        if !self.slots.contains(&LinearSlot::Gate) {
            self.linear(backend, LinearSlot::Up, adapted, x, &mut mlp.up, taps)?;
            return backend.activate(self.activation, &mlp.up, &mut mlp.activation);
        }
        let slots = [LinearSlot::Gate, LinearSlot::Up];
        self.linears(backend, slots, adapted, x, [&mut mlp.gate, &mut mlp.up], taps)?;
        backend.activate_multiply(self.activation, &mlp.gate, &mlp.up, &mut mlp.activation)
    }

    /// The output of the experts of each row, in their order; in `w.projected` that of the expert that sees every
    /// token, if there is one, is weighed first.
    fn mix(
        &self,
        backend: &B,
        experts: &Experts<B>,
        batch: &Batch,
        w: &mut Workspace<B>,
        taps: Taps<'_, B>,
    ) -> Result<()> {
        let Some(buffers) = &mut w.experts else {
            return Err(Error::new(ErrorCode::Internal, "the workspace was made for a decoder without experts"));
        };
        if let Some(shared_gate) = &experts.shared_gate {
            backend.linear(shared_gate, &w.normed, &mut buffers.shared_gate)?;
            let logits = backend.download(&buffers.shared_gate)?;
            let shares: Vec<f32> = logits.iter().map(|logit| 1.0 / (1.0 + (-logit).exp())).collect();
            backend.scale_rows(&shares, &mut w.projected)?;
        } else {
            w.projected = backend.tensor(batch.rows(), experts.hidden_size)?;
        }
        backend.linear(&experts.router, &w.normed, &mut buffers.router)?;
        let routes = experts.spec.route(&backend.download(&buffers.router)?);
        for (expert, route) in (0u16..).zip(&routes).filter(|(_, route)| !route.rows.is_empty()) {
            let adapted = adapted_rows(batch, Some(&route.rows));
            buffers.set_expert_rows(backend, route.rows.len())?;
            let (input, mlp) = (&mut buffers.input, &mut buffers.mlp);
            backend.take_rows(&w.normed, &route.rows, input)?;
            taps(Tap::Input(TapPoint::ExpertInput(expert), input, Some(&route.rows)))?;
            let slots = [LinearSlot::ExpertGate(expert), LinearSlot::ExpertUp(expert)];
            self.linears(backend, slots, &adapted, input, [&mut mlp.gate, &mut mlp.up], taps)?;
            backend.activate_multiply(self.activation, &mlp.gate, &mlp.up, &mut mlp.activation)?;
            taps(Tap::Input(TapPoint::ExpertActivation(expert), &mlp.activation, Some(&route.rows)))?;
            let down = LinearSlot::ExpertDown(expert);
            self.linear(backend, down, &adapted, &mlp.activation, &mut buffers.output, taps)?;
            backend.add_rows(&buffers.output, &route.rows, &route.shares, &mut w.projected)?;
        }
        Ok(())
    }

    fn linear(
        &self,
        backend: &B,
        slot: LinearSlot,
        adapted: &[AdaptedRows],
        x: &B::Tensor,
        y: &mut B::Tensor,
        taps: Taps<'_, B>,
    ) -> Result<()> {
        self.linears(backend, [slot], adapted, x, [y], taps)
    }

    /// The products of one input with several Linears, and what their adapters add.
    fn linears<const N: usize>(
        &self,
        backend: &B,
        slots: [LinearSlot; N],
        adapted: &[AdaptedRows],
        x: &B::Tensor,
        mut outputs: [&mut B::Tensor; N],
        taps: Taps<'_, B>,
    ) -> Result<()> {
        let mut places = [0; N];
        for (place, slot) in places.iter_mut().zip(slots) {
            *place = self
                .slots
                .iter()
                .position(|&known| known == slot)
                .ok_or_else(|| Error::new(ErrorCode::Internal, format!("the block has no {slot:?}")))?;
        }
        backend.linears(&places.map(|place| &self.linears[place]), x, &mut outputs)?;
        for (place, y) in places.into_iter().zip(outputs) {
            let updates: Vec<_> = adapted
                .iter()
                .filter_map(|AdaptedRows { rows, adapter }| {
                    self.adapters[*adapter][place].as_ref().map(|update| (rows.clone(), update))
                })
                .collect();
            backend.add_low_ranks(&updates, x, y)?;
            taps(Tap::Output(place, y))?;
        }
        Ok(())
    }
}

/// The rows with an adapter in a tensor that holds all rows of the batch, or those of `taken`, which ascend.
fn adapted_rows(batch: &Batch, taken: Option<&[usize]>) -> Vec<AdaptedRows> {
    let place = |row: usize| taken.map_or(row, |taken| taken.partition_point(|&taken| taken < row));
    let adapted = batch.segments().iter().filter_map(|segment| {
        Some(AdaptedRows { rows: place(segment.rows.start)..place(segment.rows.end), adapter: segment.adapter? })
    });
    adapted.filter(|adapted| !adapted.rows.is_empty()).collect()
}
