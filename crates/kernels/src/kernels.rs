use std::ops::Range;

use kintsugi_runtime::{CpuFeatures, CpuLevel, Error, ErrorCode, Result, ThreadPool};
use kintsugi_weights::{LinearWeight, LowRank};

use crate::activation::Activation;
use crate::attention::{AttentionTask, ROWS_PER_TASK, Scores};
use crate::kernel_table::KernelTable;
use crate::kv_pages::{AttentionSegment, KvPages, PAGE_POSITIONS};
use crate::pack::{pack_factors, pack_linear};
use crate::packed_matrix::Arithmetic;
use crate::product::{UpdatedRows, accumulate_updates, multiply};
use crate::shared_rows::SharedRows;
use crate::{PackedLowRank, PackedMatrix, RotaryTable, scalar};
#[cfg(target_arch = "x86_64")]
use crate::{avx2, avx512, avxvnni};
#[cfg(target_arch = "aarch64")]
use crate::{neon, neon_dotprod, neon_i8mm};

/// Elements that are worth a task of their own in the element-wise operations.
const TASK_ELEMENTS: usize = 1 << 14;

/// Multiplications that are worth a thread of their own in attention.
const TASK_MULTIPLICATIONS: usize = 1 << 17;

/// How products are computed. A property of a packed matrix, whatever the number of rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Precision {
    /// Activations and sums in f32.
    F32,
    /// Activations rounded to bf16 where the CPU multiplies bf16 faster than f32 and the weights are exact in it (codes
    /// and bf16), f32 elsewhere; sums and low-rank parts in f32.
    Exact,
    /// Activations rounded to int8, with a scale in each row for each run of up to 128 columns of a group, where
    /// weights are codes that stand for integers; as `Exact` where they are not (plain floats, NF4, groups along the
    /// outputs). Sums of a block in i32, then f32. A of a compensation, as codes of 8 bits, reads the same int8, so that
    /// x is rounded once for `(W + B A) x`; B and adapters of a request are in f32.
    Fast,
}

/// The operations of one CPU level.
///
/// For one level and precision a result is the same bit for bit whatever the number of threads, and a row of a
/// result whatever the other rows are.
#[derive(Clone, Copy)]
pub struct Kernels {
    level: CpuLevel,
    /// Whether products in bf16 are worth it.
    bf16: bool,
    table: &'static KernelTable,
}

impl std::fmt::Debug for Kernels {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kernels").field("level", &self.level).field("bf16", &self.bf16).finish()
    }
}

impl Kernels {
    /// The operations of a level.
    ///
    /// # Errors
    /// `ERR_CPU_LEVEL` when this CPU lacks the level.
    pub fn new(level: CpuLevel) -> Result<Kernels> {
        if !level.is_available() {
            let message = format!("this CPU cannot run level '{}'", level.name());
            return Err(Error::new(ErrorCode::CpuLevel, message)
                .subject(level.name())
                .hint(format!("Its best level is '{}'", CpuLevel::best().name())));
        }
        let table = match level {
            #[cfg(target_arch = "x86_64")]
            CpuLevel::Avx2 => &avx2::TABLE,
            #[cfg(target_arch = "x86_64")]
            CpuLevel::AvxVnni => &avxvnni::TABLE,
            #[cfg(target_arch = "x86_64")]
            CpuLevel::Avx512Vnni => &avx512::TABLE,
            #[cfg(target_arch = "aarch64")]
            CpuLevel::Neon => &neon::TABLE,
            #[cfg(target_arch = "aarch64")]
            CpuLevel::NeonDotprod => &neon_dotprod::TABLE,
            #[cfg(target_arch = "aarch64")]
            CpuLevel::NeonI8mm => &neon_i8mm::TABLE,
            _ => &scalar::TABLE,
        };
        Ok(Kernels { level, bf16: CpuFeatures::detect().fast_bf16, table })
    }

    /// The same operations, with products in bf16 on every CPU that has them, quicker than f32 or not: so that they can be
    /// tested on more machines.
    #[must_use]
    pub fn with_bf16(self) -> Kernels {
        Kernels { bf16: CpuFeatures::detect().avx512_bf16, ..self }
    }

    /// The operations of the level that `KINTSUGI_CPU` forces, else of the best.
    ///
    /// # Errors
    /// `ERR_CPU_LEVEL` when `KINTSUGI_CPU` names no level or one that this CPU lacks.
    pub fn selected() -> Result<Kernels> {
        Kernels::new(CpuLevel::selected()?)
    }

    /// The level.
    pub fn level(&self) -> CpuLevel {
        self.level
    }

    /// What products with `weight` are computed in, low-rank part aside: what its precision comes to with these
    /// weights on this CPU.
    pub fn arithmetic(&self, weight: &PackedMatrix) -> Arithmetic {
        if weight.main.integers.is_some() {
            return Arithmetic::Int8;
        }
        let bf16 = self.level == CpuLevel::Avx512Vnni && self.bf16;
        if weight.precision != Precision::F32 && bf16 && weight.main.encoding.fits_bf16() {
            Arithmetic::Bf16
        } else {
            Arithmetic::F32
        }
    }

    pub(crate) fn table(&self) -> &'static KernelTable {
        self.table
    }

    /// Packs a Linear for [`product`](Self::product): its matrix with B of its compensation in the same panels, A
    /// of the compensation, and its bias. Factors that are made of codes stay codes, but for A in [`Precision::Fast`].
    ///
    /// # Errors
    /// `ERR_SHAPE_MISMATCH` when the matrix has no rows or no columns, or bias or compensation do not fit it.
    pub fn pack(&self, weight: &LinearWeight, precision: Precision, pool: &ThreadPool) -> Result<PackedMatrix> {
        pack_linear(weight, precision, pool)
    }

    /// `y = W x + B (A x) + bias` for each row of `x`, `[count, in]`, into `y`, `[count, out]`.
    ///
    /// # Panics
    /// When the lengths of `x` and `y` are not multiples of `in` and `out` by the same count.
    pub fn product(&self, weight: &PackedMatrix, x: &[f32], y: &mut [f32], pool: &ThreadPool) {
        self.products(&[weight], x, &mut [y], pool);
    }

    /// The [products](Self::product) of one input with several matrices, each into an output of its own: the same bits, in
    /// one call of the pool. x is packed once for matrices that read it alike, and multiplied once with an A that they
    /// [share](PackedMatrix::share_projection).
    ///
    /// # Panics
    /// As [`product`](Self::product) for each of them, and when their number is not that of the outputs or they differ in
    /// `in`.
    pub fn products(&self, weights: &[&PackedMatrix], x: &[f32], outputs: &mut [&mut [f32]], pool: &ThreadPool) {
        assert_eq!(weights.len(), outputs.len(), "each matrix has an output");
        for (weight, y) in weights.iter().zip(outputs.iter()) {
            assert_eq!(weight.columns, weights[0].columns, "matrices of one input are as wide");
            check_product(weight.rows, weight.columns, x, y);
        }
        multiply(self, weights, x, outputs, pool);
    }

    /// Packs a low-rank update that is added per request.
    ///
    /// # Errors
    /// `ERR_SHAPE_MISMATCH` when the update has no outputs or no inputs.
    pub fn pack_low_rank(&self, factors: &LowRank, scaling: f32, pool: &ThreadPool) -> Result<PackedLowRank> {
        let (out_features, in_features) = (factors.out_features(), factors.in_features());
        if out_features == 0 || in_features == 0 {
            let message = format!("a {out_features}×{in_features} update cannot be multiplied with");
            return Err(Error::new(ErrorCode::ShapeMismatch, message).subject("LowRank"));
        }
        let factors = if factors.rank() > 0 { Some(pack_factors(factors, pool)?) } else { None };
        Ok(PackedLowRank { out_features, in_features, scaling, factors })
    }

    /// `y += scaling · B (A x)` in f32 for some rows of `x`, `[count, in]`, and the same rows of `y`, `[count, out]`:
    /// each range of rows with an update of its own. All of them share a call of the pool; packing x takes more where an
    /// update has many rows. Ranks may differ.
    ///
    /// # Panics
    /// When updates differ in `in` or `out`, the lengths of `x` and `y` are not multiples of them by the same count, or
    /// ranges overlap or reach beyond it.
    pub fn accumulate_low_ranks(
        &self,
        updates: &[(Range<usize>, &PackedLowRank)],
        x: &[f32],
        y: &mut [f32],
        pool: &ThreadPool,
    ) {
        let Some((_, first)) = updates.first() else { return };
        check_product(first.out_features, first.in_features, x, y);
        let mut taken = vec![false; x.len() / first.in_features];
        let mut grouped: Vec<UpdatedRows<'_>> = Vec::new();
        for (rows, update) in updates {
            let same = (update.out_features, update.in_features) == (first.out_features, first.in_features);
            assert!(same, "updates of one call have one shape");
            for taken in &mut taken[rows.clone()] {
                assert!(!std::mem::replace(taken, true), "two updates share a row");
            }
            match grouped.iter_mut().find(|group| std::ptr::eq(group.update, *update)) {
                Some(group) => group.rows.extend(rows.clone()),
                None => grouped.push(UpdatedRows { update, rows: rows.clone().collect() }),
            }
        }
        accumulate_updates(self, &grouped, x, &SharedRows::new(y, first.out_features), pool);
    }

    /// `out = weight · x / √(mean(x²) + epsilon)` for each row of `weight.len()`.
    ///
    /// # Panics
    /// When `x` is not whole rows or `out` has another length.
    pub fn rms_norm(&self, x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32], pool: &ThreadPool) {
        let width = weight.len();
        assert!(width > 0 && x.len().is_multiple_of(width), "{} values are not rows of {width}", x.len());
        assert_eq!(x.len(), out.len(), "rms_norm writes as many values as it reads");
        let chunk = (TASK_ELEMENTS / width).max(1) * width;
        pool.for_each_chunk(out, chunk, |task, out| {
            let x = &x[task * chunk..][..out.len()];
            // SAFETY: this CPU has the level of the table.
            unsafe { (self.table.rms_norm)(x, weight, epsilon, out) }
        });
    }

    /// [`rms_norm`](Self::rms_norm) in place.
    ///
    /// # Panics
    /// When `x` is not whole rows.
    pub fn rms_norm_assign(&self, x: &mut [f32], weight: &[f32], epsilon: f32, pool: &ThreadPool) {
        let width = weight.len();
        assert!(width > 0 && x.len().is_multiple_of(width), "{} values are not rows of {width}", x.len());
        pool.for_each_chunk(x, (TASK_ELEMENTS / width).max(1) * width, |_, x| {
            // SAFETY: this CPU has the level of the table.
            unsafe { (self.table.rms_norm_assign)(x, weight, epsilon) }
        });
    }

    /// `out = weight · (x − mean(x)) / √(variance(x) + epsilon) + bias` for each row of `weight.len()`.
    ///
    /// # Panics
    /// When `x` is not whole rows, or `out` or `bias` has another length.
    pub fn layer_norm(
        &self,
        x: &[f32],
        weight: &[f32],
        bias: &[f32],
        epsilon: f32,
        out: &mut [f32],
        pool: &ThreadPool,
    ) {
        let width = weight.len();
        assert!(width > 0 && x.len().is_multiple_of(width), "{} values are not rows of {width}", x.len());
        assert!(x.len() == out.len() && bias.len() == width, "layer_norm writes as many values as it reads");
        let chunk = (TASK_ELEMENTS / width).max(1) * width;
        pool.for_each_chunk(out, chunk, |task, out| {
            let x = &x[task * chunk..][..out.len()];
            // SAFETY: this CPU has the level of the table.
            unsafe { (self.table.layer_norm)(x, weight, bias, epsilon, out) }
        });
    }

    /// Turns the heads of each row of `x`, `[rows, heads · head_dim]`, by the row of the table.
    ///
    /// # Panics
    /// When `x` does not have whole heads and one row per row of the table, or more dimensions turn than a head has.
    pub fn rotate(&self, table: &RotaryTable, head_dim: usize, x: &mut [f32], pool: &ThreadPool) {
        if table.rows() == 0 {
            assert!(x.is_empty() || table.half() == 0, "the rotary table has no rows");
            return;
        }
        let width = x.len() / table.rows();
        assert!(width * table.rows() == x.len() && width.is_multiple_of(head_dim), "x has whole heads in every row");
        assert!(2 * table.half() <= head_dim, "a head of {head_dim} has no {} pairs", table.half());
        let rows = (TASK_ELEMENTS / width.max(1)).max(1);
        pool.for_each_chunk(x, rows * width, |task, x| {
            for (row, x) in x.chunks_exact_mut(width).enumerate() {
                let (cosines, sines) = table.row(task * rows + row);
                // SAFETY: this CPU has the level of the table.
                unsafe { (self.table.rotate)(cosines, sines, head_dim, x) }
            }
        });
    }

    /// `out = activation(x)`, element by element.
    ///
    /// # Panics
    /// When the lengths differ.
    pub fn activate(&self, activation: Activation, x: &[f32], out: &mut [f32], pool: &ThreadPool) {
        assert_eq!(x.len(), out.len(), "activate works on equal lengths");
        let activate = (self.table.activate)(activation);
        pool.for_each_chunk(out, TASK_ELEMENTS, |task, out| {
            // SAFETY: this CPU has the level of the table.
            unsafe { activate(&x[task * TASK_ELEMENTS..][..out.len()], out) }
        });
    }

    /// `out = activation(gate) · up`, element by element.
    ///
    /// # Panics
    /// When the lengths differ.
    pub fn activate_multiply(
        &self,
        activation: Activation,
        gate: &[f32],
        up: &[f32],
        out: &mut [f32],
        pool: &ThreadPool,
    ) {
        assert!(gate.len() == up.len() && up.len() == out.len(), "activate_multiply works on equal lengths");
        let multiply = (self.table.activate_multiply)(activation);
        pool.for_each_chunk(out, TASK_ELEMENTS, |task, out| {
            let range = task * TASK_ELEMENTS..task * TASK_ELEMENTS + out.len();
            // SAFETY: this CPU has the level of the table.
            unsafe { multiply(&gate[range.clone()], &up[range], out) }
        });
    }

    /// `x = cap · tanh(x / cap)`, element by element.
    pub fn soft_cap(&self, cap: f32, x: &mut [f32], pool: &ThreadPool) {
        pool.for_each_chunk(x, TASK_ELEMENTS, |_, x| {
            // SAFETY: this CPU has the level of the table.
            unsafe { (self.table.soft_cap)(cap, x) }
        });
    }

    /// `x += y`, element by element.
    ///
    /// # Panics
    /// When the lengths differ.
    pub fn add_assign(&self, x: &mut [f32], y: &[f32], pool: &ThreadPool) {
        assert_eq!(x.len(), y.len(), "add_assign works on equal lengths");
        pool.for_each_chunk(x, TASK_ELEMENTS, |task, x| {
            // SAFETY: this CPU has the level of the table.
            unsafe { (self.table.add_assign)(x, &y[task * TASK_ELEMENTS..][..x.len()]) }
        });
    }

    /// Stores the keys and values of every segment's rows, `[rows, kvHeads · headDim]`, in its pages.
    ///
    /// # Panics
    /// When `k` or `v` are not whole rows, a segment has rows that they lack, or its pages do not reach its last
    /// position or do not exist.
    pub fn write_kv(&self, pages: &mut KvPages, segments: &[AttentionSegment<'_>], k: &[f32], v: &[f32]) {
        let width = pages.kv_heads() * pages.head_dim();
        assert!(k.len().is_multiple_of(width) && k.len() == v.len(), "keys and values are rows of {width}");
        for segment in segments {
            check_segment(segment, pages, k.len() / width);
            pages.write(segment, k, v);
        }
    }

    /// Causal attention: query head `h` of a row attends, with the scores that `scores` describes, to the positions of
    /// its segment up to its own, with key-value head `h / (heads / kvHeads)`. `q` and `out` are `[rows, heads · headDim]`;
    /// the keys and values of the rows must have been written. Rows of no segment are left as they are.
    ///
    /// # Panics
    /// When `heads` is not a multiple of the key-value heads, `q` is not whole rows or `out` has another length, a
    /// segment has rows that they lack, its pages do not reach its last position or do not exist, or segments
    /// overlap.
    pub fn attention(
        &self,
        q: &[f32],
        heads: usize,
        pages: &KvPages,
        segments: &[AttentionSegment<'_>],
        scores: Scores,
        out: &mut [f32],
        pool: &ThreadPool,
    ) {
        let width = heads * pages.head_dim();
        assert!(heads > 0 && heads.is_multiple_of(pages.kv_heads()), "{heads} heads do not share {}", pages.kv_heads());
        assert!(q.len().is_multiple_of(width) && q.len() == out.len(), "queries and outputs are rows of {width}");
        let rows = q.len() / width;
        let mut taken = vec![false; rows];
        for segment in segments {
            check_segment(segment, pages, rows);
            for taken in &mut taken[segment.rows.clone()] {
                assert!(!std::mem::replace(taken, true), "segments share a row");
            }
        }
        let out = SharedRows::new(out, width);
        let mut tasks = Vec::new();
        let mut multiplications = 0;
        for segment in segments {
            let seen = segment.positions().min(scores.window.map_or(usize::MAX, |window| window + segment.rows.len()));
            multiplications += segment.rows.len() * seen * width * 2;
            for start in segment.rows.clone().step_by(ROWS_PER_TASK) {
                let rows = start..segment.rows.end.min(start + ROWS_PER_TASK);
                tasks.extend((0..pages.kv_heads()).map(|kv_head| AttentionTask {
                    pages,
                    segment,
                    rows: rows.clone(),
                    kv_head,
                    heads,
                    scores,
                    q,
                    out: &out,
                }));
            }
        }
        let chunks = (multiplications / TASK_MULTIPLICATIONS).clamp(1, tasks.len().max(1));
        pool.for_each(chunks, |chunk| {
            for task in &tasks[chunk * tasks.len() / chunks..(chunk + 1) * tasks.len() / chunks] {
                // SAFETY: this CPU has the level of the table; rows and heads of the tasks are disjoint.
                unsafe { (self.table.attend)(task) }
            }
        });
    }
}

fn check_product(rows: usize, columns: usize, x: &[f32], y: &[f32]) {
    let count = x.len() / columns;
    assert!(
        x.len() == count * columns && y.len() == count * rows,
        "{} inputs and {} outputs do not fit a {rows}×{columns} product",
        x.len(),
        y.len()
    );
}

fn check_segment(segment: &AttentionSegment<'_>, pages: &KvPages, rows: usize) {
    assert!(segment.rows.start <= segment.rows.end && segment.rows.end <= rows, "a segment has rows beyond {rows}");
    let needed = segment.positions().div_ceil(PAGE_POSITIONS);
    assert!(segment.pages.len() >= needed, "{} positions need {needed} pages", segment.positions());
    let exist = segment.pages[..needed].iter().all(|&page| (page as usize) < pages.page_count());
    assert!(exist, "a segment has a page beyond {}", pages.page_count());
}
