use std::borrow::Cow;
use std::ops::Range;

use candle_core::{D, DType, Device, Tensor};
use kintsugi_kernels::PAGE_POSITIONS;
use kintsugi_runtime::{Error, ErrorCode, Result};
use kintsugi_weights::{LinearWeight, LowRank};

use crate::{AttentionShape, Backend, Batch};

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

/// Cosines and sines, `[positions, headDim / 2]`.
#[derive(Debug)]
pub struct CandleRotary {
    cosines: Tensor,
    sines: Tensor,
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

fn failed(error: candle_core::Error) -> Error {
    Error::new(ErrorCode::Internal, format!("candle: {error}")).subject("CandleBackend")
}

fn rotate_halves(x: &Tensor, cosines: &Tensor, sines: &Tensor) -> candle_core::Result<Tensor> {
    let half = x.dim(D::Minus1)? / 2;
    let (real, imaginary) = (x.narrow(D::Minus1, 0, half)?, x.narrow(D::Minus1, half, half)?);
    let turned_real = (real.broadcast_mul(cosines)? - imaginary.broadcast_mul(sines)?)?;
    let turned_imaginary = (imaginary.broadcast_mul(cosines)? + real.broadcast_mul(sines)?)?;
    Tensor::cat(&[turned_real, turned_imaginary], D::Minus1)
}

/// Causal attention of `rows` queries that start at `first`, over `total` keys; all `[heads, rows, headDim]`.
fn attend(q: &Tensor, k: &Tensor, v: &Tensor, first: usize) -> candle_core::Result<Tensor> {
    let (rows, total, head_dim) = (q.dim(1)?, k.dim(1)?, q.dim(2)?);
    let mask: Vec<f32> = (0..rows)
        .flat_map(|row| (0..total).map(move |key| if key <= first + row { 0.0 } else { f32::NEG_INFINITY }))
        .collect();
    let mask = Tensor::from_vec(mask, (1, rows, total), &Device::Cpu)?;
    let scores = (q.matmul(&k.t()?)? * (1.0 / (head_dim as f64).sqrt()))?.broadcast_add(&mask)?;
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
    type Norm = Tensor;
    type Rotary = CandleRotary;
    type KvCache = CandleKvCache;

    fn name(&self) -> &'static str {
        "candle"
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

    fn prepare_norm(&self, weight: &[f32]) -> Result<Tensor> {
        Tensor::from_slice(weight, weight.len(), &Device::Cpu).map_err(failed)
    }

    fn prepare_rotary(&self, head_dim: usize, theta: f64, positions: usize) -> Result<CandleRotary> {
        let half = head_dim / 2;
        let angles: Vec<f64> = (0..positions)
            .flat_map(|p| (0..half).map(move |i| p as f64 * theta.powf(-2.0 * i as f64 / head_dim as f64)))
            .collect();
        let tensor = |function: fn(f64) -> f64| {
            let values: Vec<f32> = angles.iter().map(|&angle| function(angle) as f32).collect();
            Tensor::from_vec(values, (positions, half), &Device::Cpu).map_err(failed)
        };
        Ok(CandleRotary { cosines: tensor(f64::cos)?, sines: tensor(f64::sin)? })
    }

    fn linear_bytes(&self, linear: &CandleLinear) -> usize {
        let factors = linear.low_rank.as_ref().map_or(0, |low_rank| low_rank.a.elem_count() + low_rank.b.elem_count());
        (linear.transposed.elem_count() + factors) * size_of::<f32>()
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

    fn add_low_rank(
        &self,
        factors: &CandleLowRank,
        rows: Range<usize>,
        x: &CandleTensor,
        y: &mut CandleTensor,
    ) -> Result<()> {
        let compute = || {
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
        y.tensor = compute().map_err(failed)?;
        Ok(())
    }

    fn rms_norm(&self, x: &CandleTensor, norm: &Tensor, epsilon: f32, out: &mut CandleTensor) -> Result<()> {
        let compute = || {
            let mean_square = x.tensor.sqr()?.mean_keepdim(D::Minus1)?;
            x.tensor.broadcast_div(&(mean_square + f64::from(epsilon))?.sqrt()?)?.broadcast_mul(norm)
        };
        out.tensor = compute().map_err(failed)?;
        Ok(())
    }

    fn rotate(&self, rotary: &CandleRotary, positions: &[u32], heads: usize, x: &mut CandleTensor) -> Result<()> {
        let rows = positions.len();
        let compute = || {
            let index = Tensor::from_slice(positions, rows, &Device::Cpu)?;
            let cosines = rotary.cosines.index_select(&index, 0)?.unsqueeze(1)?;
            let sines = rotary.sines.index_select(&index, 0)?.unsqueeze(1)?;
            let split = x.tensor.reshape((rows, heads, x.width / heads))?;
            rotate_halves(&split, &cosines, &sines)?.reshape((rows, x.width))
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
                let attended = attend(&queries, &keys, &values, segment.first_position)?;
                parts.push(attended.transpose(0, 1)?.contiguous()?.reshape((rows, shape.heads * shape.head_dim))?);
            }
            Tensor::cat(&parts, 0)
        };
        out.tensor = compute().map_err(failed)?;
        Ok(())
    }

    fn silu_multiply(&self, gate: &CandleTensor, up: &CandleTensor, out: &mut CandleTensor) -> Result<()> {
        out.tensor = gate.tensor.silu().and_then(|silu| silu * &up.tensor).map_err(failed)?;
        Ok(())
    }

    fn add_assign(&self, x: &mut CandleTensor, y: &CandleTensor) -> Result<()> {
        x.tensor = (&x.tensor + &y.tensor).map_err(failed)?;
        Ok(())
    }
}
