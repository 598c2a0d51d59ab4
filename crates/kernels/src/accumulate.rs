use crate::codec::Codec;
use crate::grid_parameters::GridParameters;
use crate::vector::{LANES, Level, Vector};

/// Adds the products of a few panels with a few rows of x to a tile of outputs. One per (level, encoding,
/// arithmetic, rows, panels).
///
/// # Safety
/// The CPU must have the level, and the pointers of the job must reach what its fields promise.
pub(crate) type Accumulate = unsafe fn(&PanelJob<'_>);

/// The arguments of [`Accumulate`].
pub(crate) struct PanelJob<'a> {
    /// The first block of the first panel.
    pub(crate) panels: *const u8,
    /// Bytes from a panel to the next.
    pub(crate) panel_stride: usize,
    /// Steps of each block.
    pub(crate) steps: &'a [u32],
    /// What stands after the codes of each block; `None` for plain floats.
    pub(crate) grid: Option<GridParameters>,
    /// What codes stand for, where the encoding is [`Table4`](crate::codec::Table4).
    pub(crate) table: &'a [f32; 16],
    /// The first word of the first row of x: f32, or pairs of bf16.
    pub(crate) x: *const u32,
    /// Words from a row of x to the next.
    pub(crate) x_stride: usize,
    /// The sums of the first row of x over the columns of each block; the next row's are `x_stride` further. Read
    /// where blocks have zero points or offsets.
    pub(crate) block_sums: *const f32,
    /// `[rows][panels][32]`.
    pub(crate) tile: *mut f32,
}

/// The body of [`Accumulate`].
///
/// A block is summed from zero over its columns in order, then added to the tile as `scale · (sum − zero · Σx)` or
/// `scale · sum + offset · Σx`: the same additions for an output whatever `ROWS` and `PANELS` are.
///
/// # Safety
/// See [`Accumulate`].
#[inline(always)]
pub(crate) unsafe fn accumulate<C: Codec, const ROWS: usize, const PANELS: usize>(job: &PanelJob<'_>) {
    // SAFETY: the caller has the level, and the job's pointers reach every block, row and panel of it.
    unsafe {
        let level = C::Level::assume();
        let state = C::state(level, job.table);
        let (mut block_start, mut x_start) = (0, 0);
        for (block, &steps) in job.steps.iter().enumerate() {
            let mut sums = [[level.splat(0.0); PANELS]; ROWS];
            for _ in 0..steps {
                let mut panels = [job.panels; PANELS];
                for panel in 0..PANELS {
                    panels[panel] = job.panels.add(panel * job.panel_stride + block_start);
                    // More rows wait for their multiplications and not for codes.
                    if ROWS <= 2 {
                        C::Level::PREFETCH.ahead_of(panels[panel], C::BYTES);
                    }
                }
                let mut x = [job.x; ROWS];
                for row in 0..ROWS {
                    x[row] = job.x.add(row * job.x_stride + x_start);
                }
                C::step::<ROWS, PANELS>(level, state, panels, x, &mut sums);
                block_start += C::BYTES;
                x_start += C::X_WORDS;
            }
            for panel in 0..PANELS {
                let parameters = job.panels.add(panel * job.panel_stride + block_start);
                let grid = job.grid.map(|grid| grid.load(level, parameters));
                for row in 0..ROWS {
                    let tile = &mut *job.tile.add((row * PANELS + panel) * LANES).cast::<[f32; LANES]>();
                    let mut sum = sums[row][panel];
                    let mut total = level.load(tile);
                    match grid {
                        None => total = total.add(sum),
                        Some(grid) => {
                            if grid.zero_points.is_some() || grid.offsets.is_some() {
                                let block_sum = *job.block_sums.add(row * job.x_stride + block);
                                if let Some(zero) = grid.zero_points {
                                    sum = zero.mul_add(level.splat(-block_sum), sum);
                                }
                                if let Some(offset) = grid.offsets {
                                    total = offset.mul_add(level.splat(block_sum), total);
                                }
                            }
                            total = sum.mul_add(grid.scales, total);
                        }
                    }
                    total.store(tile);
                }
            }
            block_start += job.grid.map_or(0, GridParameters::bytes);
        }
    }
}
