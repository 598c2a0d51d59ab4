use std::borrow::Cow;
use std::ops::Range;

use kintsugi_kernels::{
    Activation, Arithmetic, AttentionSegment, Kernels, KvPages, PackedLowRank, PackedMatrix, Precision, RotaryTable,
};
use kintsugi_runtime::{CpuFeatures, Result, ThreadPool};
use kintsugi_weights::{LinearWeight, LowRank};

use crate::{AttentionShape, Backend, Batch, ColumnRuns, NormWeight};

/// Our own kernels on the shared thread pool: the default backend.
#[derive(Debug, Clone, Copy)]
pub struct CpuBackend {
    kernels: Kernels,
    precision: Precision,
    pool: &'static ThreadPool,
}

/// Row-major activations.
#[derive(Debug, Clone)]
pub struct CpuTensor {
    width: usize,
    values: Vec<f32>,
}

impl CpuBackend {
    /// The selected CPU level on the shared pool.
    ///
    /// # Errors
    /// `ERR_CPU_LEVEL` when `KINTSUGI_CPU` forces a level that this machine lacks.
    pub fn new(precision: Precision) -> Result<Self> {
        Ok(Self::with(Kernels::selected()?, precision, ThreadPool::global()))
    }

    /// Kernels of a given level on a given pool.
    pub fn with(kernels: Kernels, precision: Precision, pool: &'static ThreadPool) -> Self {
        CpuBackend { kernels, precision, pool }
    }

    /// How products are computed.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// The kernels that compute.
    pub fn kernels(&self) -> &Kernels {
        &self.kernels
    }
}

fn segments(batch: &Batch) -> Vec<AttentionSegment<'_>> {
    batch
        .segments()
        .iter()
        .map(|segment| AttentionSegment {
            rows: segment.rows.clone(),
            first_position: segment.first_position,
            pages: &segment.pages,
        })
        .collect()
}

impl Backend for CpuBackend {
    type Tensor = CpuTensor;
    type Linear = PackedMatrix;
    type LowRank = PackedLowRank;
    type Norm = NormWeight;
    type Rotary = RotaryTable;
    type KvCache = KvPages;

    fn name(&self) -> &'static str {
        "cpu"
    }

    fn identity(&self) -> String {
        let bf16 = CpuFeatures::detect().fast_bf16;
        format!("cpu {} {:?}{}", self.kernels.level().name(), self.precision, if bf16 { " bf16" } else { "" })
    }

    fn prepare(&self, weight: &LinearWeight) -> Result<PackedMatrix> {
        self.kernels.pack(weight, self.precision, self.pool)
    }

    fn share_projection(&self, linear: &mut PackedMatrix, other: &PackedMatrix) {
        linear.share_projection(other);
    }

    fn prepare_low_rank(&self, factors: &LowRank, scaling: f32) -> Result<PackedLowRank> {
        self.kernels.pack_low_rank(factors, scaling, self.pool)
    }

    fn prepare_norm(&self, weight: &NormWeight) -> Result<NormWeight> {
        Ok(weight.clone())
    }

    fn prepare_rotary(&self, table: RotaryTable) -> Result<RotaryTable> {
        Ok(table)
    }

    fn linear_bytes(&self, linear: &PackedMatrix) -> usize {
        linear.memory_bytes()
    }

    fn arithmetic(&self, linear: &PackedMatrix) -> Arithmetic {
        self.kernels.arithmetic(linear)
    }

    fn tensor(&self, rows: usize, width: usize) -> Result<CpuTensor> {
        Ok(CpuTensor { width, values: vec![0.0; rows * width] })
    }

    fn set_rows(&self, tensor: &mut CpuTensor, rows: usize) -> Result<()> {
        tensor.values.resize(rows * tensor.width, 0.0);
        Ok(())
    }

    fn upload(&self, values: &[f32], tensor: &mut CpuTensor) -> Result<()> {
        tensor.values.clear();
        tensor.values.extend_from_slice(values);
        Ok(())
    }

    fn download<'a>(&self, tensor: &'a CpuTensor) -> Result<Cow<'a, [f32]>> {
        Ok(Cow::Borrowed(&tensor.values))
    }

    fn kv_cache(&self, shape: AttentionShape) -> Result<KvPages> {
        Ok(KvPages::new(shape.kv_heads, shape.head_dim))
    }

    fn linear(&self, linear: &PackedMatrix, x: &CpuTensor, y: &mut CpuTensor) -> Result<()> {
        self.kernels.product(linear, &x.values, &mut y.values, self.pool);
        Ok(())
    }

    fn linears(&self, linears: &[&PackedMatrix], x: &CpuTensor, outputs: &mut [&mut CpuTensor]) -> Result<()> {
        let mut outputs: Vec<&mut [f32]> = outputs.iter_mut().map(|y| y.values.as_mut_slice()).collect();
        self.kernels.products(linears, &x.values, &mut outputs, self.pool);
        Ok(())
    }

    fn add_low_ranks(
        &self,
        updates: &[(Range<usize>, &PackedLowRank)],
        x: &CpuTensor,
        y: &mut CpuTensor,
    ) -> Result<()> {
        self.kernels.accumulate_low_ranks(updates, &x.values, &mut y.values, self.pool);
        Ok(())
    }

    fn take_columns(&self, x: &CpuTensor, runs: ColumnRuns, out: &mut CpuTensor) -> Result<()> {
        let rows = x.values.chunks_exact(x.width).zip(out.values.chunks_exact_mut(out.width));
        for (x, out) in rows {
            for (run, out) in out.chunks_exact_mut(runs.width).enumerate() {
                out.copy_from_slice(&x[runs.start + run * runs.stride..][..runs.width]);
            }
        }
        Ok(())
    }

    fn take_rows(&self, x: &CpuTensor, rows: &[usize], out: &mut CpuTensor) -> Result<()> {
        for (&row, out) in rows.iter().zip(out.values.chunks_exact_mut(x.width)) {
            out.copy_from_slice(&x.values[row * x.width..][..x.width]);
        }
        Ok(())
    }

    fn add_rows(&self, x: &CpuTensor, rows: &[usize], shares: &[f32], y: &mut CpuTensor) -> Result<()> {
        for ((x, &row), share) in x.values.chunks_exact(x.width).zip(rows).zip(shares) {
            let y = &mut y.values[row * y.width..][..y.width];
            y.iter_mut().zip(x).for_each(|(y, x)| *y += share * x);
        }
        Ok(())
    }

    fn scale_rows(&self, shares: &[f32], x: &mut CpuTensor) -> Result<()> {
        for (x, share) in x.values.chunks_exact_mut(x.width).zip(shares) {
            x.iter_mut().for_each(|x| *x *= share);
        }
        Ok(())
    }

    fn norm(&self, x: &CpuTensor, norm: &NormWeight, epsilon: f32, out: &mut CpuTensor) -> Result<()> {
        match norm {
            NormWeight::Rms(weight) => {
                self.kernels.rms_norm(&x.values, weight, epsilon, &mut out.values, self.pool);
            }
            NormWeight::Layer { weight, bias } => {
                self.kernels.layer_norm(&x.values, weight, bias, epsilon, &mut out.values, self.pool);
            }
        }
        Ok(())
    }

    fn norm_assign(&self, x: &mut CpuTensor, norm: &NormWeight, epsilon: f32) -> Result<()> {
        match norm {
            NormWeight::Rms(weight) => self.kernels.rms_norm_assign(&mut x.values, weight, epsilon, self.pool),
            NormWeight::Layer { weight, bias } => {
                let input = x.values.clone();
                self.kernels.layer_norm(&input, weight, bias, epsilon, &mut x.values, self.pool);
            }
        }
        Ok(())
    }

    fn rotate(&self, rotary: &RotaryTable, head_dim: usize, x: &mut CpuTensor) -> Result<()> {
        self.kernels.rotate(rotary, head_dim, &mut x.values, self.pool);
        Ok(())
    }

    fn attention(
        &self,
        shape: AttentionShape,
        batch: &Batch,
        q: &CpuTensor,
        k: &CpuTensor,
        v: &CpuTensor,
        cache: &mut KvPages,
        out: &mut CpuTensor,
    ) -> Result<()> {
        let segments = segments(batch);
        cache.reserve(batch.pages_needed());
        self.kernels.write_kv(cache, &segments, &k.values, &v.values);
        self.kernels.attention(&q.values, shape.heads, cache, &segments, shape.scores, &mut out.values, self.pool);
        Ok(())
    }

    fn activate(&self, activation: Activation, x: &CpuTensor, out: &mut CpuTensor) -> Result<()> {
        self.kernels.activate(activation, &x.values, &mut out.values, self.pool);
        Ok(())
    }

    fn activate_multiply(
        &self,
        activation: Activation,
        gate: &CpuTensor,
        up: &CpuTensor,
        out: &mut CpuTensor,
    ) -> Result<()> {
        self.kernels.activate_multiply(activation, &gate.values, &up.values, &mut out.values, self.pool);
        Ok(())
    }

    fn soft_cap(&self, cap: f32, x: &mut CpuTensor) -> Result<()> {
        self.kernels.soft_cap(cap, &mut x.values, self.pool);
        Ok(())
    }

    fn add_assign(&self, x: &mut CpuTensor, y: &CpuTensor) -> Result<()> {
        self.kernels.add_assign(&mut x.values, &y.values, self.pool);
        Ok(())
    }
}
