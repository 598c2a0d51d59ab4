use std::borrow::Cow;
use std::ops::Range;

use kintsugi_runtime::Result;
use kintsugi_weights::{LinearWeight, LowRank};

use crate::Batch;

/// Shape of the attention of a block.
#[derive(Clone, Copy, Debug)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
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
    /// Rotary sines and cosines.
    type Rotary: Send + Sync;
    /// Keys and values of one block, in pages.
    type KvCache: Send;

    /// Lower-case name.
    fn name(&self) -> &'static str;

    /// Packs a Linear for this backend.
    fn prepare(&self, weight: &LinearWeight) -> Result<Self::Linear>;
    /// Packs an update `y += scaling · B (A x)`.
    fn prepare_low_rank(&self, factors: &LowRank, scaling: f32) -> Result<Self::LowRank>;
    /// Takes the weight of an RMS norm.
    fn prepare_norm(&self, weight: &[f32]) -> Result<Self::Norm>;
    /// Rotary table for `positions` positions.
    fn prepare_rotary(&self, head_dim: usize, theta: f64, positions: usize) -> Result<Self::Rotary>;
    /// Bytes that a prepared Linear occupies.
    fn linear_bytes(&self, linear: &Self::Linear) -> usize;

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
    /// `y[rows] += scaling · B (A x[rows])`.
    fn add_low_rank(
        &self,
        factors: &Self::LowRank,
        rows: Range<usize>,
        x: &Self::Tensor,
        y: &mut Self::Tensor,
    ) -> Result<()>;
    /// Row-wise `x / rms(x) · weight`.
    fn rms_norm(&self, x: &Self::Tensor, norm: &Self::Norm, epsilon: f32, out: &mut Self::Tensor) -> Result<()>;
    /// Rotary embedding in place; the halves of a head are the real and imaginary parts.
    fn rotate(&self, rotary: &Self::Rotary, positions: &[u32], heads: usize, x: &mut Self::Tensor) -> Result<()>;
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
    /// `out = silu(gate) · up`.
    fn silu_multiply(&self, gate: &Self::Tensor, up: &Self::Tensor, out: &mut Self::Tensor) -> Result<()>;
    /// `x += y`.
    fn add_assign(&self, x: &mut Self::Tensor, y: &Self::Tensor) -> Result<()>;
}
