use std::borrow::Cow;
use std::ops::Range;

use kintsugi_kernels::{Activation, Arithmetic, RotaryTable, Scores};
use kintsugi_runtime::Result;
use kintsugi_weights::{LinearWeight, LowRank};

use crate::{Batch, NormWeight};

/// Shape of the attention of a block.
#[derive(Clone, Copy, Debug)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// How positions are weighed.
    pub scores: Scores,
}

/// Columns of a tensor: `count` runs of `width` that start `stride` after each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ColumnRuns {
    /// First column of the first run.
    pub start: usize,
    /// Columns from the start of a run to that of the next.
    pub stride: usize,
    /// Columns of a run.
    pub width: usize,
    /// Number of runs.
    pub count: usize,
}

/// Where a decoder computes: opaque tensors and Linears, and the operations of a block over caller-owned buffers.
///
/// A decoder family is written once over this trait. Tensors are `[rows, width]`.
pub trait Backend: Send + Sync + 'static {
    /// Activations.
    type Tensor: Send;
    /// A Linear, packed or uploaded.
    type Linear: Send + Sync;
    /// A low-rank update that requests may ask for.
    type LowRank: Send + Sync;
    /// The weight of a norm.
    type Norm: Send + Sync;
    /// Rotary sines and cosines of the rows of a batch.
    type Rotary: Send + Sync;
    /// Keys and values of one block, in pages.
    type KvCache: Send;

    /// Lower-case name.
    fn name(&self) -> &'static str;
    /// Name and everything that the bits of its results depend on.
    fn identity(&self) -> String;

    /// Packs a Linear for this backend.
    fn prepare(&self, weight: &LinearWeight) -> Result<Self::Linear>;
    /// Keeps A of the compensation once where two Linears of one input have the same: [`Backend::linears`] then may
    /// multiply with it once. No result depends on it.
    fn share_projection(&self, _linear: &mut Self::Linear, _other: &Self::Linear) {}
    /// Packs an update `y += scaling · B (A x)`.
    fn prepare_low_rank(&self, factors: &LowRank, scaling: f32) -> Result<Self::LowRank>;
    /// Takes the weight of a norm.
    fn prepare_norm(&self, weight: &NormWeight) -> Result<Self::Norm>;
    /// Takes the cosines and sines of a batch.
    fn prepare_rotary(&self, table: RotaryTable) -> Result<Self::Rotary>;
    /// Bytes that a prepared Linear occupies.
    fn linear_bytes(&self, linear: &Self::Linear) -> usize;
    /// What the products with a prepared Linear are computed in.
    fn arithmetic(&self, linear: &Self::Linear) -> Arithmetic;

    /// A tensor of zeros.
    fn tensor(&self, rows: usize, width: usize) -> Result<Self::Tensor>;
    /// Gives the tensor `rows` rows, keeping its width; the content is unspecified afterwards.
    fn set_rows(&self, tensor: &mut Self::Tensor, rows: usize) -> Result<()>;
    /// Overwrites the whole tensor with `values`.
    fn upload(&self, values: &[f32], tensor: &mut Self::Tensor) -> Result<()>;
    /// The values of the tensor.
    fn download<'a>(&self, tensor: &'a Self::Tensor) -> Result<Cow<'a, [f32]>>;

    /// An empty cache for one block.
    fn kv_cache(&self, shape: AttentionShape) -> Result<Self::KvCache>;

    /// `y = W x + B (A x) + bias`.
    fn linear(&self, linear: &Self::Linear, x: &Self::Tensor, y: &mut Self::Tensor) -> Result<()>;
    /// [`Backend::linear`] of one input with several Linears, each into an output of its own.
    fn linears(&self, linears: &[&Self::Linear], x: &Self::Tensor, outputs: &mut [&mut Self::Tensor]) -> Result<()> {
        linears.iter().zip(outputs).try_for_each(|(linear, y)| self.linear(linear, x, y))
    }
    /// `y[rows] += scaling · B (A x[rows])` for ranges of rows that do not overlap, each with factors of its own.
    fn add_low_ranks(
        &self,
        updates: &[(Range<usize>, &Self::LowRank)],
        x: &Self::Tensor,
        y: &mut Self::Tensor,
    ) -> Result<()>;
    /// `out` = some columns of `x`, run after run.
    fn take_columns(&self, x: &Self::Tensor, runs: ColumnRuns, out: &mut Self::Tensor) -> Result<()>;
    /// `out` = some rows of `x`.
    fn take_rows(&self, x: &Self::Tensor, rows: &[usize], out: &mut Self::Tensor) -> Result<()>;
    /// `y[rows[i]] += shares[i] · x[i]`.
    fn add_rows(&self, x: &Self::Tensor, rows: &[usize], shares: &[f32], y: &mut Self::Tensor) -> Result<()>;
    /// `x[i] *= shares[i]`.
    fn scale_rows(&self, shares: &[f32], x: &mut Self::Tensor) -> Result<()>;
    /// `out` = the norm of each row of `x`.
    fn norm(&self, x: &Self::Tensor, norm: &Self::Norm, epsilon: f32, out: &mut Self::Tensor) -> Result<()>;
    /// The norm of each part of `x` that is as wide as the norm, in place: of rows or of heads.
    fn norm_assign(&self, x: &mut Self::Tensor, norm: &Self::Norm, epsilon: f32) -> Result<()>;
    /// Rotary embedding in place; the halves of the part of a head that turns are the real and imaginary parts.
    fn rotate(&self, rotary: &Self::Rotary, head_dim: usize, x: &mut Self::Tensor) -> Result<()>;
    /// Appends `k` and `v` to the cache, then causal attention of `q` over it.
    fn attention(
        &self,
        shape: AttentionShape,
        batch: &Batch,
        q: &Self::Tensor,
        k: &Self::Tensor,
        v: &Self::Tensor,
        cache: &mut Self::KvCache,
        out: &mut Self::Tensor,
    ) -> Result<()>;
    /// `out = activation(x)`.
    fn activate(&self, activation: Activation, x: &Self::Tensor, out: &mut Self::Tensor) -> Result<()>;
    /// `out = activation(gate) · up`.
    fn activate_multiply(
        &self,
        activation: Activation,
        gate: &Self::Tensor,
        up: &Self::Tensor,
        out: &mut Self::Tensor,
    ) -> Result<()>;
    /// `x = cap · tanh(x / cap)`.
    fn soft_cap(&self, cap: f32, x: &mut Self::Tensor) -> Result<()>;
    /// `x += y`.
    fn add_assign(&self, x: &mut Self::Tensor, y: &Self::Tensor) -> Result<()>;
}
