use crate::codec::Encoding;
use crate::grid_parameters::{BlockGrid, GridParameters};
use crate::kernel_table::written_out;
use crate::packed_matrix::{Arithmetic, ColumnLayout, PanelEncoding};
use crate::tiled_input::TileBlock;
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
    /// The first block of the panel.
    pub(crate) panel: *const u8,
    /// Steps of each block.
    pub(crate) steps: &'a [u32],
    /// What stands after the codes of each block; `None` for plain floats.
    pub(crate) grid: Option<GridParameters>,
    /// What codes stand for, where the encoding is [`Table4`](crate::codec::Table4).
    pub(crate) table: &'a [f32; 16],
    /// The first block of the first tile of a [`TiledInput`](crate::tiled_input::TiledInput).
    pub(crate) x: *const u32,
    /// Words from a tile of x to the next.
    pub(crate) tile_stride: usize,
    /// Rows of x.
    pub(crate) rows: usize,
    /// `[rows][32]`.
    pub(crate) tile: *mut f32,
}

/// The functions of a level for products of many rows.
pub(crate) struct StripProducts {
    /// Fewer rows are quicker through an [`Accumulate`](crate::accumulate::Accumulate).
    pub(crate) least_rows: usize,
    /// Rows of a tile.
    pub(crate) tile_rows: usize,
    /// The [`AccumulateStrip`] of an encoding, in f32 or bf16.
    pub(crate) accumulate: fn(PanelEncoding, Arithmetic) -> AccumulateStrip,
}

/// The columns of a block, unpacked: `[column][32]`.
#[repr(align(64))]
struct Strip([[f32; LANES]; ColumnLayout::BLOCK_COLUMNS]);

/// The body of [`AccumulateStrip`] with tiles of up to `ROWS` rows, at most 12, and one or two halves of a panel.
///
/// # Safety
/// The CPU must have the level, and the pointers of the job must reach what its fields promise.
#[inline(always)]
pub(crate) unsafe fn accumulate_strip<L: Level, E: Encoding<L>, const ROWS: usize, const HALVES: usize>(
    job: &StripJob<'_>,
) {
    // SAFETY: the caller has the level, and the job's pointers reach every block and row of it.
    unsafe {
        const { assert!(ROWS <= 12 && (HALVES == 1 || HALVES == 2)) };
        let level = L::assume();
        let state = E::state(level, job.table);
        let mut strip = Strip([[0.0; LANES]; ColumnLayout::BLOCK_COLUMNS]);
        let (mut bytes, mut x_start) = (job.panel, 0);
        let tiles = job.rows.div_ceil(ROWS);
        let block_sums = usize::from(job.grid.is_some_and(GridParameters::needs_block_sums));
        for &steps in job.steps {
            let columns = steps as usize * E::COLUMNS;
            for step in strip.0[..columns].chunks_exact_mut(E::COLUMNS) {
                unpack::<L, E>(level, state, bytes, step);
                bytes = bytes.add(E::BYTES);
            }
            let grid = job.grid.map(|grid| grid.load(level, bytes).map(Vector::to_array));
            bytes = bytes.add(job.grid.map_or(0, GridParameters::bytes));
            for tile in 0..tiles {
                let start = tile * job.rows / tiles;
                let rows = (tile + 1) * job.rows / tiles - start;
                let tile = TileJob {
                    strip: &strip.0[..columns],
                    x: job.x.add(tile * job.tile_stride + x_start),
                    tile: job.tile.add(start * LANES),
                };
                match rows {
                    1 => tile.multiply::<L, 1, HALVES, ROWS>(level, grid.as_ref()),
                    2 => tile.multiply::<L, 2, HALVES, ROWS>(level, grid.as_ref()),
                    3 if ROWS >= 3 => tile.multiply::<L, 3, HALVES, ROWS>(level, grid.as_ref()),
                    4 if ROWS >= 4 => tile.multiply::<L, 4, HALVES, ROWS>(level, grid.as_ref()),
                    5 if ROWS >= 5 => tile.multiply::<L, 5, HALVES, ROWS>(level, grid.as_ref()),
                    6 if ROWS >= 6 => tile.multiply::<L, 6, HALVES, ROWS>(level, grid.as_ref()),
                    7 if ROWS >= 7 => tile.multiply::<L, 7, HALVES, ROWS>(level, grid.as_ref()),
                    8 if ROWS >= 8 => tile.multiply::<L, 8, HALVES, ROWS>(level, grid.as_ref()),
                    9 if ROWS >= 9 => tile.multiply::<L, 9, HALVES, ROWS>(level, grid.as_ref()),
                    10 if ROWS >= 10 => tile.multiply::<L, 10, HALVES, ROWS>(level, grid.as_ref()),
                    11 if ROWS >= 11 => tile.multiply::<L, 11, HALVES, ROWS>(level, grid.as_ref()),
                    _ => tile.multiply::<L, ROWS, HALVES, ROWS>(level, grid.as_ref()),
                }
            }
            x_start += (columns + block_sums) * ROWS;
        }
    }
}

/// Unpacks the columns of a step.
#[inline(always)]
unsafe fn unpack<L: Level, E: Encoding<L>>(level: L, state: E::State, step: *const u8, out: &mut [[f32; LANES]]) {
    // Written out, because shifts need a constant pair.
    written_out!(PAIR < E::COLUMNS / 2 => {
        // SAFETY: the caller's pointer is good for one step.
        unsafe { unpack_pair::<L, E, PAIR>(level, state, step, out) }
    });
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

/// A tile of x with a strip.
struct TileJob<'a> {
    strip: &'a [[f32; LANES]],
    /// The block of the tile.
    x: *const u32,
    /// `[rows][32]`.
    tile: *mut f32,
}

impl TileJob<'_> {
    /// # Safety
    /// The pointers must reach `ROWS` rows, in tiles of `TILE`.
    #[inline(always)]
    unsafe fn multiply<L: Level, const ROWS: usize, const HALVES: usize, const TILE: usize>(
        &self,
        level: L,
        grid: Option<&Epilogue>,
    ) {
        for first in (0..LANES).step_by(HALVES * HALF) {
            let mut sums = [[level.half([0.0; HALF].as_slice()); HALVES]; ROWS];
            // SAFETY: the caller's pointers reach every column of every row.
            unsafe {
                let mut x = self.x.cast::<f32>();
                for weights in self.strip {
                    let mut halves = [level.half(&weights[first..]); HALVES];
                    for half in 1..HALVES {
                        halves[half] = level.half(&weights[first + half * HALF..]);
                    }
                    for row in 0..ROWS {
                        let x = level.splat_half(*x.add(row));
                        for half in 0..HALVES {
                            sums[row][half] = halves[half].mul_add(x, sums[row][half]);
                        }
                    }
                    x = x.add(TILE);
                }
                let block_sums = TileBlock::after(self.x, self.strip.len(), TILE).sums();
                add_block::<L, ROWS, HALVES>(level, &sums, grid, block_sums, first, self.tile);
            }
        }
    }
}

/// Adds the sums of a block over some rows of x and the halves from row `first` of the panel on to the outputs of a
/// tile, `[rows][32]`.
///
/// # Safety
/// `tile` must reach every row, and `block_sums` as well where there are zero points or offsets.
#[inline(always)]
pub(crate) unsafe fn add_block<L: Level, const ROWS: usize, const HALVES: usize>(
    level: L,
    sums: &[[L::Half; HALVES]; ROWS],
    grid: Option<&BlockGrid<[f32; LANES]>>,
    block_sums: *const f32,
    first: usize,
    tile: *mut f32,
) {
    for row in 0..ROWS {
        for half in 0..HALVES {
            let lanes = first + half * HALF..first + (half + 1) * HALF;
            // SAFETY: as the caller promises.
            let out = unsafe { std::slice::from_raw_parts_mut(tile.add(row * LANES + lanes.start), HALF) };
            let mut sum = sums[row][half];
            let mut total = level.half(out);
            match grid {
                None => total = total.add(sum),
                Some(grid) => {
                    if grid.zero_points.is_some() || grid.offsets.is_some() {
                        // SAFETY: as the caller promises.
                        let block_sum = unsafe { *block_sums.add(row) };
                        if let Some(zero_points) = &grid.zero_points {
                            let zero = level.half(&zero_points[lanes.clone()]);
                            sum = zero.mul_add(level.splat_half(-block_sum), sum);
                        }
                        if let Some(offsets) = &grid.offsets {
                            let offset = level.half(&offsets[lanes.clone()]);
                            total = offset.mul_add(level.splat_half(block_sum), total);
                        }
                    }
                    total = sum.mul_add(level.half(&grid.scales[lanes]), total);
                }
            }
            total.store(out);
        }
    }
}
