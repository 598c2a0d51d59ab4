use crate::accumulate::PanelJob;
use crate::codec::Encoding;
use crate::grid_parameters::{BlockGrid, GridParameters};
use crate::packed_matrix::ColumnLayout;
use crate::vector::{Half, LANES, Level, Vector};

/// Lanes of a [`Half`].
pub(crate) const HALF: usize = LANES / 2;

/// Adds the products of one panel with many rows of x to a tile of outputs, in f32: the same additions, bit for bit,
/// as those of an [`Accumulate`](crate::accumulate::Accumulate).
///
/// Where rows are many, unpacking codes once per few rows costs more than multiplying. So each block of a panel is
/// unpacked into a strip of f32 that stays in the cache of the core, and tiles of as many rows as the level has
/// registers for run over it.
pub(crate) type AccumulateStrip = unsafe fn(&StripJob<'_>);

/// The arguments of [`AccumulateStrip`].
pub(crate) struct StripJob<'a> {
    /// One panel; the tile is `[rows][32]`.
    pub(crate) panel: PanelJob<'a>,
    /// Rows of x.
    pub(crate) rows: usize,
}

/// The functions of a level for products of many rows.
pub(crate) struct StripProducts {
    /// Fewer rows are quicker through an [`Accumulate`](crate::accumulate::Accumulate).
    pub(crate) least_rows: usize,
    /// The [`AccumulateStrip`] of an encoding.
    pub(crate) accumulate: fn(crate::packed_matrix::PanelEncoding) -> AccumulateStrip,
}

/// The columns of a block, unpacked: `[column][32]`.
#[repr(align(64))]
struct Strip([[f32; LANES]; ColumnLayout::BLOCK_COLUMNS]);

/// The body of [`AccumulateStrip`] with tiles of up to `ROWS` rows, at most 6, and half a panel.
///
/// # Safety
/// The CPU must have the level, and the pointers of the job must reach what its fields promise.
#[inline(always)]
pub(crate) unsafe fn accumulate_strip<L: Level, E: Encoding<L>, const ROWS: usize>(job: &StripJob<'_>) {
    // SAFETY: the caller has the level, and the job's pointers reach every block and row of it.
    unsafe {
        const { assert!(ROWS <= 6) };
        let level = L::assume();
        let state = E::state(level, job.panel.table);
        let mut strip = Strip([[0.0; LANES]; ColumnLayout::BLOCK_COLUMNS]);
        let (mut bytes, mut x_start) = (job.panel.panels, 0);
        for (block, &steps) in job.panel.steps.iter().enumerate() {
            let columns = steps as usize * E::COLUMNS;
            for step in strip.0[..columns].chunks_exact_mut(E::COLUMNS) {
                unpack::<L, E>(level, state, bytes, step);
                bytes = bytes.add(E::BYTES);
            }
            let grid = job.panel.grid.map(|grid| grid.load(level, bytes).map(Vector::to_array));
            bytes = bytes.add(job.panel.grid.map_or(0, GridParameters::bytes));
            let tiles = job.rows.div_ceil(ROWS);
            for tile in 0..tiles {
                let start = tile * job.rows / tiles;
                let rows = (tile + 1) * job.rows / tiles - start;
                let tile = TileJob {
                    strip: &strip.0[..columns],
                    x: job.panel.x.add(start * job.panel.x_stride + x_start).cast(),
                    x_stride: job.panel.x_stride,
                    block_sums: job.panel.block_sums.add(start * job.panel.x_stride + block),
                    tile: job.panel.tile.add(start * LANES),
                };
                match rows {
                    1 => tile.multiply::<L, 1>(level, grid.as_ref()),
                    2 => tile.multiply::<L, 2>(level, grid.as_ref()),
                    3 => tile.multiply::<L, 3>(level, grid.as_ref()),
                    4 => tile.multiply::<L, 4>(level, grid.as_ref()),
                    5 => tile.multiply::<L, 5>(level, grid.as_ref()),
                    _ => tile.multiply::<L, ROWS>(level, grid.as_ref()),
                }
            }
            x_start += columns;
        }
    }
}

/// Unpacks the columns of a step.
#[inline(always)]
unsafe fn unpack<L: Level, E: Encoding<L>>(level: L, state: E::State, step: *const u8, out: &mut [[f32; LANES]]) {
    // SAFETY: the caller's pointer is good for one step. Written out, because shifts need a constant pair.
    unsafe {
        unpack_pair::<L, E, 0>(level, state, step, out);
        unpack_pair::<L, E, 1>(level, state, step, out);
        if E::COLUMNS > 4 {
            unpack_pair::<L, E, 2>(level, state, step, out);
            unpack_pair::<L, E, 3>(level, state, step, out);
        }
        if E::COLUMNS > 8 {
            unpack_pair::<L, E, 4>(level, state, step, out);
            unpack_pair::<L, E, 5>(level, state, step, out);
            unpack_pair::<L, E, 6>(level, state, step, out);
            unpack_pair::<L, E, 7>(level, state, step, out);
        }
    }
}

#[inline(always)]
unsafe fn unpack_pair<L: Level, E: Encoding<L>, const PAIR: u32>(
    level: L,
    state: E::State,
    step: *const u8,
    out: &mut [[f32; LANES]],
) {
    // SAFETY: as the caller promises.
    let (even, odd) = unsafe { E::pair::<PAIR>(level, state, step) };
    even.store(&mut out[2 * PAIR as usize]);
    odd.store(&mut out[2 * PAIR as usize + 1]);
}

/// The parameters of a block in memory, where tiles read half of them at a time.
type Epilogue = BlockGrid<[f32; LANES]>;

/// Some rows of x with a strip.
struct TileJob<'a> {
    strip: &'a [[f32; LANES]],
    x: *const f32,
    x_stride: usize,
    block_sums: *const f32,
    /// `[rows][32]`.
    tile: *mut f32,
}

impl TileJob<'_> {
    /// # Safety
    /// The pointers must reach `ROWS` rows.
    #[inline(always)]
    unsafe fn multiply<L: Level, const ROWS: usize>(&self, level: L, grid: Option<&Epilogue>) {
        for half in 0..2 {
            let lanes = half * HALF..(half + 1) * HALF;
            let mut sums = [level.half([0.0; HALF].as_slice()); ROWS];
            // SAFETY: the caller's pointers reach every column of every row.
            unsafe {
                for (column, weights) in self.strip.iter().enumerate() {
                    let weights = level.half(&weights[lanes.clone()]);
                    for row in 0..ROWS {
                        let x = level.splat_half(*self.x.add(row * self.x_stride + column));
                        sums[row] = weights.mul_add(x, sums[row]);
                    }
                }
                for row in 0..ROWS {
                    let out = std::slice::from_raw_parts_mut(self.tile.add(row * LANES + half * HALF), HALF);
                    let mut sum = sums[row];
                    let mut total = level.half(out);
                    match grid {
                        None => total = total.add(sum),
                        Some(grid) => {
                            if grid.zero_points.is_some() || grid.offsets.is_some() {
                                let block_sum = *self.block_sums.add(row * self.x_stride);
                                if let Some(zero_points) = &grid.zero_points {
                                    let zero = level.half(&zero_points[lanes.clone()]);
                                    sum = zero.mul_add(level.splat_half(-block_sum), sum);
                                }
                                if let Some(offsets) = &grid.offsets {
                                    let offset = level.half(&offsets[lanes.clone()]);
                                    total = offset.mul_add(level.splat_half(block_sum), total);
                                }
                            }
                            total = sum.mul_add(level.half(&grid.scales[lanes.clone()]), total);
                        }
                    }
                    total.store(out);
                }
            }
        }
    }
}
