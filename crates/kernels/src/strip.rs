use kintsugi_weights::ElementType;

use crate::accumulate::{GridParameters, PanelJob};
use crate::codec::Encoding;
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
        let mut strip = Strip([[0.0; LANES]; ColumnLayout::BLOCK_COLUMNS]);
        let (mut bytes, mut x_start) = (job.panel.panels, 0);
        for (block, &steps) in job.panel.steps.iter().enumerate() {
            let columns = steps as usize * E::COLUMNS;
            for step in strip.0[..columns].chunks_exact_mut(E::COLUMNS) {
                unpack::<L, E>(level, bytes, step);
                bytes = bytes.add(E::BYTES);
            }
            let epilogue = Epilogue::load(level, job.panel.grid, bytes);
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
                    1 => tile.multiply::<L, 1>(level, &epilogue),
                    2 => tile.multiply::<L, 2>(level, &epilogue),
                    3 => tile.multiply::<L, 3>(level, &epilogue),
                    4 => tile.multiply::<L, 4>(level, &epilogue),
                    5 => tile.multiply::<L, 5>(level, &epilogue),
                    _ => tile.multiply::<L, ROWS>(level, &epilogue),
                }
            }
            x_start += columns;
        }
    }
}

/// Unpacks the columns of a step.
#[inline(always)]
unsafe fn unpack<L: Level, E: Encoding<L>>(level: L, step: *const u8, out: &mut [[f32; LANES]]) {
    // SAFETY: the caller's pointer is good for one step. Written out, because shifts need a constant pair.
    unsafe {
        unpack_pair::<L, E, 0>(level, step, out);
        unpack_pair::<L, E, 1>(level, step, out);
        if E::COLUMNS > 4 {
            unpack_pair::<L, E, 2>(level, step, out);
            unpack_pair::<L, E, 3>(level, step, out);
        }
        if E::COLUMNS > 8 {
            unpack_pair::<L, E, 4>(level, step, out);
            unpack_pair::<L, E, 5>(level, step, out);
            unpack_pair::<L, E, 6>(level, step, out);
            unpack_pair::<L, E, 7>(level, step, out);
        }
    }
}

#[inline(always)]
unsafe fn unpack_pair<L: Level, E: Encoding<L>, const PAIR: u32>(level: L, step: *const u8, out: &mut [[f32; LANES]]) {
    // SAFETY: as the caller promises.
    let (even, odd) = unsafe { E::pair::<PAIR>(level, step) };
    even.store(&mut out[2 * PAIR as usize]);
    odd.store(&mut out[2 * PAIR as usize + 1]);
}

/// Scales and zero points of a block, as f32.
struct Epilogue {
    scales: Option<[f32; LANES]>,
    zero_points: Option<[f32; LANES]>,
}

impl Epilogue {
    /// # Safety
    /// `parameters` must point to what `grid` describes.
    #[inline(always)]
    unsafe fn load<L: Level>(level: L, grid: Option<GridParameters>, parameters: *const u8) -> Self {
        let Some(grid) = grid else { return Epilogue { scales: None, zero_points: None } };
        // SAFETY: as the caller promises.
        unsafe {
            let scales = match grid.scale_type {
                ElementType::F32 => level.f32s(level.load_words(&*parameters.cast())),
                ElementType::F16 => level.load_f16(&*parameters.cast()),
                ElementType::Bf16 => level.load_bf16(&*parameters.cast()),
            };
            let zero_points = parameters.add(LANES * grid.scale_type.bits() / 8);
            Epilogue {
                scales: Some(scales.to_array()),
                zero_points: grid.zero_points.then(|| level.load_i8(&*zero_points.cast()).to_array()),
            }
        }
    }
}

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
    unsafe fn multiply<L: Level, const ROWS: usize>(&self, level: L, epilogue: &Epilogue) {
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
                    if let Some(zero_points) = &epilogue.zero_points {
                        let block_sum = level.splat_half(-*self.block_sums.add(row * self.x_stride));
                        sum = level.half(&zero_points[lanes.clone()]).mul_add(block_sum, sum);
                    }
                    let total = level.half(out);
                    match &epilogue.scales {
                        Some(scales) => sum.mul_add(level.half(&scales[lanes.clone()]), total),
                        None => total.add(sum),
                    }
                    .store(out);
                }
            }
        }
    }
}
