use std::ops::Range;

use crate::activation::cap_lanes;
use crate::kv_pages::{AttentionSegment, KvPages, PAGE_POSITIONS};
use crate::shared_rows::SharedRows;
use crate::vector::{LANES, Level, Vector, exp};

/// Rows of a segment that one task takes.
pub(crate) const ROWS_PER_TASK: usize = 16;

/// How attention weighs positions.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scores {
    /// What products of queries and keys are multiplied with.
    pub scale: f32,
    /// Scores become `cap · tanh(score / cap)`.
    pub cap: Option<f32>,
    /// Positions that a row sees, its own included; `None` for all up to it.
    pub window: Option<usize>,
}

/// Some rows of a segment with the query heads that share one key-value head.
pub(crate) struct AttentionTask<'a> {
    pub(crate) pages: &'a KvPages,
    pub(crate) segment: &'a AttentionSegment<'a>,
    /// Rows of the batch, inside of the segment.
    pub(crate) rows: Range<usize>,
    pub(crate) kv_head: usize,
    /// Query heads of a row.
    pub(crate) heads: usize,
    pub(crate) scores: Scores,
    /// `[rows, heads · headDim]` of the whole batch.
    pub(crate) q: &'a [f32],
    /// The same shape. No other task may touch the rows and heads of this one.
    pub(crate) out: &'a SharedRows<'a>,
}

/// One query head of one row.
#[derive(Clone, Copy)]
struct Query {
    row: usize,
    head: usize,
    /// The first position that it sees.
    first: usize,
    /// The position after the last that it sees: its own.
    end: usize,
}

/// Causal attention of a task by an online softmax over the pages in their order (arXiv 2205.14135).
///
/// Up to `QUERIES` queries read a page together. Each has sums of its own and adds only the positions that it sees,
/// so its result does not depend on its company.
#[inline(always)]
pub(crate) fn attend<L: Level, const QUERIES: usize>(level: L, task: &AttentionTask<'_>) {
    let group = task.heads / task.pages.kv_heads();
    let query = |index: usize| {
        let row = task.rows.start + index / group;
        let end = task.segment.first_position + (row - task.segment.rows.start) + 1;
        let first = task.scores.window.map_or(0, |window| end.saturating_sub(window));
        Query { row, head: task.kv_head * group + index % group, first, end }
    };
    let mut sums = vec![[0.0; LANES]; QUERIES * task.pages.value_stride() / LANES];
    let count = task.rows.len() * group;
    let mut index = 0;
    while index < count {
        if count - index >= QUERIES {
            let mut queries = [query(index); QUERIES];
            for i in 1..QUERIES {
                queries[i] = query(index + i);
            }
            attend_queries::<L, QUERIES>(level, task, queries, &mut sums);
            index += QUERIES;
        } else {
            attend_queries::<L, 1>(level, task, [query(index)], &mut sums);
            index += 1;
        }
    }
}

/// `sums` is `[QUERIES][value_stride / 32]`.
#[inline(always)]
fn attend_queries<L: Level, const QUERIES: usize>(
    level: L,
    task: &AttentionTask<'_>,
    queries: [Query; QUERIES],
    sums: &mut [[f32; LANES]],
) {
    let head_dim = task.pages.head_dim();
    let vectors = task.pages.value_stride() / LANES;
    let sums = &mut sums[..QUERIES * vectors];
    sums.fill([0.0; LANES]);
    let mut largest = [f32::NEG_INFINITY; QUERIES];
    let mut totals = [0.0f32; QUERIES];
    let mut q = [task.q; QUERIES];
    for i in 0..QUERIES {
        q[i] = &task.q[(queries[i].row * task.heads + queries[i].head) * head_dim..][..head_dim];
    }
    let end = queries.iter().map(|query| query.end).max().unwrap_or(0);
    let first_page = queries.iter().map(|query| query.first).min().unwrap_or(0) / PAGE_POSITIONS;
    for index in first_page..end.div_ceil(PAGE_POSITIONS) {
        let page = task.segment.pages[index];
        let slot = |position: usize| position.saturating_sub(index * PAGE_POSITIONS).min(PAGE_POSITIONS);
        let mut seen = [(0, 0); QUERIES];
        for i in 0..QUERIES {
            seen[i] = (slot(queries[i].first), slot(queries[i].end));
        }
        let mut weights = [[[f32::NEG_INFINITY; LANES]; 2]; QUERIES];
        scores(level, task.pages.keys(page, task.kv_head), q, task.scores, &mut weights);
        for i in 0..QUERIES {
            if seen[i].0 >= seen[i].1 {
                continue;
            }
            let weights = &mut weights[i];
            weights.as_flattened_mut()[..seen[i].0].fill(f32::NEG_INFINITY);
            weights.as_flattened_mut()[seen[i].1..].fill(f32::NEG_INFINITY);
            let (low, high) = (level.load(&weights[0]), level.load(&weights[1]));
            let new_largest = low.max(high).maximum().max(largest[i]);
            let low = exp(level, low.sub(level.splat(new_largest)));
            let high = exp(level, high.sub(level.splat(new_largest)));
            low.store(&mut weights[0]);
            high.store(&mut weights[1]);
            let shrink = exp(level, level.splat(largest[i] - new_largest));
            largest[i] = new_largest;
            totals[i] = totals[i] * shrink.to_array()[0] + low.add(high).sum();
            for sum in &mut sums[i * vectors..(i + 1) * vectors] {
                level.load(sum).mul(shrink).store(sum);
            }
        }
        weigh(level, task.pages.values(page, task.kv_head), &weights, seen, sums);
    }
    for i in 0..QUERIES {
        // SAFETY: the row and head of a query belong to this task alone, and this is the only slice of them.
        let out = unsafe {
            let start = queries[i].head * head_dim;
            task.out.slice(queries[i].row, start..start + head_dim)
        };
        for (out, sum) in out.iter_mut().zip(sums[i * vectors..(i + 1) * vectors].as_flattened()) {
            *out = sum / totals[i];
        }
    }
}

/// The scores of the 64 positions of a page.
#[inline(always)]
fn scores<L: Level, const QUERIES: usize>(
    level: L,
    keys: &[f32],
    q: [&[f32]; QUERIES],
    how: Scores,
    scores: &mut [[[f32; LANES]; 2]; QUERIES],
) {
    for half in 0..2 {
        let mut sums = [level.splat(0.0); QUERIES];
        for (dimension, keys) in keys.as_chunks::<LANES>().0.as_chunks::<2>().0.iter().enumerate() {
            let keys = level.load(&keys[half]);
            for i in 0..QUERIES {
                sums[i] = keys.mul_add(level.splat(q[i][dimension]), sums[i]);
            }
        }
        for i in 0..QUERIES {
            let scaled = sums[i].mul(level.splat(how.scale));
            match how.cap {
                None => scaled,
                Some(cap) => cap_lanes(level, scaled, cap),
            }
            .store(&mut scores[i][half]);
        }
    }
}

/// Adds `weights · V` of the positions that each query sees. What it does not see may hold anything, NaN included,
/// and is not touched for it.
#[inline(always)]
fn weigh<L: Level, const QUERIES: usize>(
    level: L,
    values: &[f32],
    weights: &[[[f32; LANES]; 2]; QUERIES],
    seen: [(usize, usize); QUERIES],
    sums: &mut [[f32; LANES]],
) {
    let vectors = sums.len() / QUERIES;
    let values = values.as_chunks::<LANES>().0;
    // Every query adds its positions in their order: those before the common ones, the common ones, those after.
    let start = seen.iter().map(|seen| seen.0).max().unwrap_or(0);
    let end = seen.iter().map(|seen| seen.1).min().unwrap_or(0).max(start);
    for vector in 0..vectors {
        let mut totals = [level.splat(0.0); QUERIES];
        for i in 0..QUERIES {
            totals[i] = level.load(&sums[i * vectors + vector]);
            for position in seen[i].0..seen[i].1.min(start) {
                let values = level.load(&values[position * vectors + vector]);
                totals[i] = values.mul_add(level.splat(weights[i].as_flattened()[position]), totals[i]);
            }
        }
        for position in start..end {
            let values = level.load(&values[position * vectors + vector]);
            for i in 0..QUERIES {
                totals[i] = values.mul_add(level.splat(weights[i].as_flattened()[position]), totals[i]);
            }
        }
        for i in 0..QUERIES {
            for position in seen[i].0.max(end)..seen[i].1 {
                let values = level.load(&values[position * vectors + vector]);
                totals[i] = values.mul_add(level.splat(weights[i].as_flattened()[position]), totals[i]);
            }
            totals[i].store(&mut sums[i * vectors + vector]);
        }
    }
}
