use std::borrow::Cow;
use std::ops::Range;

use candle_core::{D, DType, Device, Tensor};
use kintsugi_kernels::{Activation, Arithmetic, PAGE_POSITIONS, RotaryTable, Scores};
use kintsugi_runtime::{Error, ErrorCode, Result};
use kintsugi_weights::{LinearWeight, LowRank};

use crate::{AttentionShape, Backend, Batch, ColumnRuns, NormWeight};

/// candle-core on the CPU in f32: the plain float reference that every other backend is checked against.
#[derive(Debug, Clone, Copy, Default)]
pub struct CandleBackend;

/// A Linear as candle tensors.
#[derive(Debug)]
pub struct CandleLinear {
    /// `[in, out]`
    transposed: Tensor,
    /// `[out]`
    bias: Option<Tensor>,
    low_rank: Option<CandleLowRank>,
}

/// Factors as candle tensors; the scaling is in B.
#[derive(Debug)]
pub struct CandleLowRank {
    /// `[in, rank]`
    a: Tensor,
    /// `[rank, out]`
    b: Tensor,
}

/// Cosines and sines, `[rows, 1, pairs]`.
#[derive(Debug)]
pub struct CandleRotary {
    cosines: Tensor,
    sines: Tensor,
}

/// The weight of a norm as candle tensors.
#[derive(Debug)]
pub enum CandleNorm {
    /// `[width]`
    Rms(Tensor),
    /// Weight and bias, `[width]` each.
    Layer(Tensor, Tensor),
}

/// Keys and values by page, `[PAGE_POSITIONS, kvHeads · headDim]` each.
#[derive(Debug, Default)]
pub struct CandleKvCache {
    pages: Vec<CandlePage>,
}

#[derive(Debug, Clone)]
struct CandlePage {
    keys: Vec<f32>,
    values: Vec<f32>,
}

/// A tensor that knows its width, since an operation replaces it as a whole.
#[derive(Debug)]
pub struct CandleTensor {
    width: usize,
    tensor: Tensor,
}

impl CandleLowRank {
    fn new(factors: &LowRank, scaling: f32) -> candle_core::Result<Self> {
        let (rank, device) = (factors.rank(), Device::Cpu);
        let a = Tensor::from_slice(factors.a(), (rank, factors.in_features()), &device)?;
        let b = Tensor::from_slice(factors.b(), (factors.out_features(), rank), &device)?;
        Ok(CandleLowRank { a: a.t()?.contiguous()?, b: (b.t()?.contiguous()? * f64::from(scaling))? })
    }

    fn apply(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        x.matmul(&self.a)?.matmul(&self.b)
    }
}

impl CandleNorm {
    fn width(&self) -> usize {
        let (CandleNorm::Rms(weight) | CandleNorm::Layer(weight, _)) = self;
        weight.elem_count()
    }

    fn apply(&self, x: &Tensor, epsilon: f32) -> candle_core::Result<Tensor> {
        match self {
            CandleNorm::Rms(weight) => rms_norm(x, weight, epsilon),
            CandleNorm::Layer(weight, bias) => {
                let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
                rms_norm(&centred, weight, epsilon)?.broadcast_add(bias)
            }
        }
    }
}

fn indices(rows: &[usize]) -> candle_core::Result<Tensor> {
    Tensor::from_vec(rows.iter().map(|&row| row as u32).collect::<Vec<_>>(), rows.len(), &Device::Cpu)
}

fn vector(values: &[f32]) -> Result<Tensor> {
    Tensor::from_slice(values, values.len(), &Device::Cpu).map_err(failed)
}

fn failed(error: candle_core::Error) -> Error {
    Error::new(ErrorCode::Internal, format!("candle: {error}")).subject("CandleBackend")
}

fn rotate_halves(x: &Tensor, cosines: &Tensor, sines: &Tensor) -> candle_core::Result<Tensor> {
    let (half, width) = (cosines.dim(D::Minus1)?, x.dim(D::Minus1)?);
    let (real, imaginary) = (x.narrow(D::Minus1, 0, half)?, x.narrow(D::Minus1, half, half)?);
    let turned_real = (real.broadcast_mul(cosines)? - imaginary.broadcast_mul(sines)?)?;
    let turned_imaginary = (imaginary.broadcast_mul(cosines)? + real.broadcast_mul(sines)?)?;
    let mut parts = vec![turned_real, turned_imaginary];
    if width > 2 * half {
        parts.push(x.narrow(D::Minus1, 2 * half, width - 2 * half)?);
    }
    Tensor::cat(&parts, D::Minus1)
}

fn rms_norm(x: &Tensor, weight: &Tensor, epsilon: f32) -> candle_core::Result<Tensor> {
    let mean_square = x.sqr()?.mean_keepdim(D::Minus1)?;
    x.broadcast_div(&(mean_square + f64::from(epsilon))?.sqrt()?)?.broadcast_mul(weight)
}

fn activate(activation: Activation, x: &Tensor) -> candle_core::Result<Tensor> {
    match activation {
        Activation::Silu => x.silu(),
        Activation::Gelu => x.gelu_erf(),
        Activation::GeluTanh => x.gelu(),
    }
}

/// Causal attention of `rows` queries that start at `first`, over `total` keys; all `[heads, rows, headDim]`.
fn attend(q: &Tensor, k: &Tensor, v: &Tensor, first: usize, how: Scores) -> candle_core::Result<Tensor> {
    let (rows, total) = (q.dim(1)?, k.dim(1)?);
    let window = how.window.unwrap_or(usize::MAX);
    let sees = |row: usize, key: usize| key <= first + row && first + row - key < window;
    let mask: Vec<f32> = (0..rows)
        .flat_map(|row| (0..total).map(move |key| if sees(row, key) { 0.0 } else { f32::NEG_INFINITY }))
        .collect();
    let mask = Tensor::from_vec(mask, (1, rows, total), &Device::Cpu)?;
    let mut scores = (q.matmul(&k.t()?)? * f64::from(how.scale))?;
    if let Some(cap) = how.cap.map(f64::from) {
        scores = ((scores / cap)?.tanh()? * cap)?;
    }
    let scores = scores.broadcast_add(&mask)?;
    let exponentials = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
    let weights = exponentials.broadcast_div(&exponentials.sum_keepdim(D::Minus1)?)?;
    weights.matmul(v)
}

impl CandleKvCache {
    fn write(&mut self, batch: &Batch, k: &[f32], v: &[f32], width: usize) {
        let empty = CandlePage { keys: vec![0.0; PAGE_POSITIONS * width], values: vec![0.0; PAGE_POSITIONS * width] };
        self.pages.resize(self.pages.len().max(batch.pages_needed()), empty);
        for segment in batch.segments() {
            for (i, row) in segment.rows.clone().enumerate() {
                let position = segment.first_position + i;
                let page = &mut self.pages[segment.pages[position / PAGE_POSITIONS] as usize];
                let slot = position % PAGE_POSITIONS * width;
                page.keys[slot..slot + width].copy_from_slice(&k[row * width..(row + 1) * width]);
                page.values[slot..slot + width].copy_from_slice(&v[row * width..(row + 1) * width]);
            }
        }
    }

    fn gather(
        &self,
        pages: &[u32],
        total: usize,
        shape: AttentionShape,
        of: impl Fn(&CandlePage) -> &[f32],
    ) -> candle_core::Result<Tensor> {
        let width = shape.kv_heads * shape.head_dim;
        let mut rows = Vec::with_capacity(total * width);
        for position in 0..total {
            let page = of(&self.pages[pages[position / PAGE_POSITIONS] as usize]);
            let slot = position % PAGE_POSITIONS * width;
            rows.extend_from_slice(&page[slot..slot + width]);
        }
        let repeat = shape.heads / shape.kv_heads;
        Tensor::from_vec(rows, (total, shape.kv_heads, shape.head_dim), &Device::Cpu)?
            .transpose(0, 1)?
            .unsqueeze(1)?
            .expand((shape.kv_heads, repeat, total, shape.head_dim))?
            .contiguous()?
            .reshape((shape.heads, total, shape.head_dim))
    }
}

impl Backend for CandleBackend {
    type Tensor = CandleTensor;
    type Linear = CandleLinear;
    type LowRank = CandleLowRank;
    type Norm = CandleNorm;
    type Rotary = CandleRotary;
    type KvCache = CandleKvCache;

    fn name(&self) -> &'static str {
        "candle"
    }

    fn identity(&self) -> String {
        self.name().to_owned()
    }

    fn prepare(&self, weight: &LinearWeight) -> Result<CandleLinear> {
        let make = || {
            let shape = (weight.matrix.rows(), weight.matrix.columns());
            let dense = Tensor::from_vec(weight.matrix.to_f32(), shape, &Device::Cpu)?;
            let bias = weight.bias.as_ref().map(|bias| Tensor::from_slice(bias, bias.len(), &Device::Cpu));
            let low_rank = weight.low_rank.as_ref().map(|factors| CandleLowRank::new(factors, 1.0));
            Ok(CandleLinear {
                transposed: dense.t()?.contiguous()?,
                bias: bias.transpose()?,
                low_rank: low_rank.transpose()?,
            })
        };
        make().map_err(failed)
    }

    fn prepare_low_rank(&self, factors: &LowRank, scaling: f32) -> Result<CandleLowRank> {
        CandleLowRank::new(factors, scaling).map_err(failed)
    }

    fn prepare_norm(&self, weight: &NormWeight) -> Result<CandleNorm> {
        match weight {
            NormWeight::Rms(weight) => Ok(CandleNorm::Rms(vector(weight)?)),
            NormWeight::Layer { weight, bias } => Ok(CandleNorm::Layer(vector(weight)?, vector(bias)?)),
        }
    }

    fn prepare_rotary(&self, table: RotaryTable) -> Result<CandleRotary> {
        let tensor =
            |values: &[f32]| Tensor::from_slice(values, (table.rows(), 1, table.half()), &Device::Cpu).map_err(failed);
        Ok(CandleRotary { cosines: tensor(table.cosines())?, sines: tensor(table.sines())? })
    }

    fn linear_bytes(&self, linear: &CandleLinear) -> usize {
        let factors = linear.low_rank.as_ref().map_or(0, |low_rank| low_rank.a.elem_count() + low_rank.b.elem_count());
        (linear.transposed.elem_count() + factors) * size_of::<f32>()
    }

    fn arithmetic(&self, _: &CandleLinear) -> Arithmetic {
        Arithmetic::F32
    }

    fn tensor(&self, rows: usize, width: usize) -> Result<CandleTensor> {
        // candle has no tensors without elements; the first operation replaces this one anyway.
        let tensor = Tensor::zeros((rows.max(1), width), DType::F32, &Device::Cpu).map_err(failed)?;
        Ok(CandleTensor { width, tensor })
    }

    fn set_rows(&self, tensor: &mut CandleTensor, rows: usize) -> Result<()> {
        *tensor = self.tensor(rows, tensor.width)?;
        Ok(())
    }

    fn upload(&self, values: &[f32], tensor: &mut CandleTensor) -> Result<()> {
        let rows = values.len() / tensor.width;
        tensor.tensor = Tensor::from_slice(values, (rows, tensor.width), &Device::Cpu).map_err(failed)?;
        Ok(())
    }

    fn download<'a>(&self, tensor: &'a CandleTensor) -> Result<Cow<'a, [f32]>> {
        let values = tensor.tensor.flatten_all().and_then(|flat| flat.to_vec1::<f32>());
        Ok(Cow::Owned(values.map_err(failed)?))
    }

    fn kv_cache(&self, _shape: AttentionShape) -> Result<CandleKvCache> {
        Ok(CandleKvCache::default())
    }

    fn linear(&self, linear: &CandleLinear, x: &CandleTensor, y: &mut CandleTensor) -> Result<()> {
        let compute = || {
            let mut sum = x.tensor.matmul(&linear.transposed)?;
            if let Some(low_rank) = &linear.low_rank {
                sum = (sum + low_rank.apply(&x.tensor)?)?;
            }
            match &linear.bias {
                Some(bias) => sum.broadcast_add(bias),
                None => Ok(sum),
            }
        };
        y.tensor = compute().map_err(failed)?;
        Ok(())
    }

    fn add_low_ranks(
        &self,
        updates: &[(Range<usize>, &CandleLowRank)],
        x: &CandleTensor,
        y: &mut CandleTensor,
    ) -> Result<()> {
        let compute = |rows: &Range<usize>, factors: &CandleLowRank, y: &CandleTensor| {
            let update = factors.apply(&x.tensor.narrow(0, rows.start, rows.len())?)?;
            let after = y.tensor.dim(0)? - rows.end;
            let changed = (y.tensor.narrow(0, rows.start, rows.len())? + update)?;
            let mut parts = Vec::with_capacity(3);
            if rows.start > 0 {
                parts.push(y.tensor.narrow(0, 0, rows.start)?);
            }
            parts.push(changed);
            if after > 0 {
                parts.push(y.tensor.narrow(0, rows.end, after)?);
            }
            Tensor::cat(&parts, 0)
        };
        for (rows, factors) in updates {
            y.tensor = compute(rows, factors, y).map_err(failed)?;
        }
        Ok(())
    }

    fn take_columns(&self, x: &CandleTensor, runs: ColumnRuns, out: &mut CandleTensor) -> Result<()> {
        let compute = || {
            let parts = (0..runs.count).map(|run| x.tensor.narrow(1, runs.start + run * runs.stride, runs.width));
            Tensor::cat(&parts.collect::<candle_core::Result<Vec<_>>>()?, 1)?.contiguous()
        };
        out.tensor = compute().map_err(failed)?;
        Ok(())
    }

    fn take_rows(&self, x: &CandleTensor, rows: &[usize], out: &mut CandleTensor) -> Result<()> {
        out.tensor = indices(rows).and_then(|index| x.tensor.index_select(&index, 0)).map_err(failed)?;
        Ok(())
    }

    fn add_rows(&self, x: &CandleTensor, rows: &[usize], shares: &[f32], y: &mut CandleTensor) -> Result<()> {
        let compute = || {
            let shares = Tensor::from_slice(shares, (shares.len(), 1), &Device::Cpu)?;
            y.tensor.index_add(&indices(rows)?, &x.tensor.broadcast_mul(&shares)?, 0)
        };
        y.tensor = compute().map_err(failed)?;
        Ok(())
    }

    fn scale_rows(&self, shares: &[f32], x: &mut CandleTensor) -> Result<()> {
        let shares = Tensor::from_slice(shares, (shares.len(), 1), &Device::Cpu);
        x.tensor = shares.and_then(|shares| x.tensor.broadcast_mul(&shares)).map_err(failed)?;
        Ok(())
    }

    fn norm(&self, x: &CandleTensor, norm: &CandleNorm, epsilon: f32, out: &mut CandleTensor) -> Result<()> {
        out.tensor = norm.apply(&x.tensor, epsilon).map_err(failed)?;
        Ok(())
    }

    fn norm_assign(&self, x: &mut CandleTensor, norm: &CandleNorm, epsilon: f32) -> Result<()> {
        let compute = || {
            let rows = x.tensor.elem_count() / norm.width();
            norm.apply(&x.tensor.reshape((rows, norm.width()))?, epsilon)?.reshape(x.tensor.shape())
        };
        x.tensor = compute().map_err(failed)?;
        Ok(())
    }

    fn rotate(&self, rotary: &CandleRotary, head_dim: usize, x: &mut CandleTensor) -> Result<()> {
        let rows = x.tensor.elem_count() / x.width;
        let compute = || {
            let split = x.tensor.reshape((rows, x.width / head_dim, head_dim))?;
            rotate_halves(&split, &rotary.cosines, &rotary.sines)?.reshape((rows, x.width))
        };
        x.tensor = compute().map_err(failed)?;
        Ok(())
    }

    fn attention(
        &self,
        shape: AttentionShape,
        batch: &Batch,
        q: &CandleTensor,
        k: &CandleTensor,
        v: &CandleTensor,
        cache: &mut CandleKvCache,
        out: &mut CandleTensor,
    ) -> Result<()> {
        cache.write(batch, &self.download(k)?, &self.download(v)?, shape.kv_heads * shape.head_dim);
        let compute = || {
            let mut parts = Vec::with_capacity(batch.segments().len());
            for segment in batch.segments() {
                let rows = segment.rows.len();
                let total = segment.first_position + rows;
                let keys = cache.gather(&segment.pages, total, shape, |page| &page.keys)?;
                let values = cache.gather(&segment.pages, total, shape, |page| &page.values)?;
                let queries = q.tensor.narrow(0, segment.rows.start, rows)?;
                let queries = queries.reshape((rows, shape.heads, shape.head_dim))?.transpose(0, 1)?.contiguous()?;
                let attended = attend(&queries, &keys, &values, segment.first_position, shape.scores)?;
                parts.push(attended.transpose(0, 1)?.contiguous()?.reshape((rows, shape.heads * shape.head_dim))?);
            }
            Tensor::cat(&parts, 0)
        };
        out.tensor = compute().map_err(failed)?;
        Ok(())
    }

    fn activate(&self, activation: Activation, x: &CandleTensor, out: &mut CandleTensor) -> Result<()> {
        out.tensor = activate(activation, &x.tensor).map_err(failed)?;
        Ok(())
    }

    fn activate_multiply(
        &self,
        activation: Activation,
        gate: &CandleTensor,
        up: &CandleTensor,
        out: &mut CandleTensor,
    ) -> Result<()> {
        out.tensor = activate(activation, &gate.tensor).and_then(|active| active * &up.tensor).map_err(failed)?;
        Ok(())
    }

    fn soft_cap(&self, cap: f32, x: &mut CandleTensor) -> Result<()> {
        let cap = f64::from(cap);
        let compute = || (&x.tensor / cap)?.tanh()? * cap;
        x.tensor = compute().map_err(failed)?;
        Ok(())
    }

    fn add_assign(&self, x: &mut CandleTensor, y: &CandleTensor) -> Result<()> {
        x.tensor = (&x.tensor + &y.tensor).map_err(failed)?;
        Ok(())
    }
}
