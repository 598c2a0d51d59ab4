use kintsugi_weights::ElementType;

use crate::codec::Codec;
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
    /// The first word of the first row of x: f32, or pairs of bf16.
    pub(crate) x: *const u32,
    /// Words from a row of x to the next.
    pub(crate) x_stride: usize,
    /// The sums of the first row of x over the columns of each block; the next row's are `x_stride` further. Read
    /// where there are zero points.
    pub(crate) block_sums: *const f32,
    /// `[rows][panels][32]`.
    pub(crate) tile: *mut f32,
}

/// The parameters of the grid of a block: 32 scales, then 32 zero points.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GridParameters {
    /// The type that scales are stored in.
    pub(crate) scale_type: ElementType,
    /// Whether zero points follow, as signed bytes relative to half the range of a code.
    pub(crate) zero_points: bool,
}

impl GridParameters {
    /// Bytes of the scales and zero points of a block.
    pub(crate) fn bytes(self) -> usize {
        LANES * (self.scale_type.bits() / 8 + usize::from(self.zero_points))
    }
}

/// The body of [`Accumulate`].
///
/// A block is summed from zero over its columns in order, then added to the tile as `scale · (sum − zero · Σx)`:
/// the same additions for an output whatever `ROWS` and `PANELS` are.
///
/// # Safety
/// See [`Accumulate`].
#[inline(always)]
pub(crate) unsafe fn accumulate<C: Codec, const ROWS: usize, const PANELS: usize>(job: &PanelJob<'_>) {
    // SAFETY: the caller has the level, and the job's pointers reach every block, row and panel of it.
    unsafe {
        let level = C::Level::assume();
        let (mut block_start, mut x_start) = (0, 0);
        for (block, &steps) in job.steps.iter().enumerate() {
            let mut sums = [[level.splat(0.0); PANELS]; ROWS];
            for _ in 0..steps {
                let mut panels = [job.panels; PANELS];
                for panel in 0..PANELS {
                    panels[panel] = job.panels.add(panel * job.panel_stride + block_start);
                }
                let mut x = [job.x; ROWS];
                for row in 0..ROWS {
                    x[row] = job.x.add(row * job.x_stride + x_start);
                }
                C::step::<ROWS, PANELS>(level, panels, x, &mut sums);
                block_start += C::BYTES;
                x_start += C::X_WORDS;
            }
            for panel in 0..PANELS {
                let parameters = job.panels.add(panel * job.panel_stride + block_start);
                let (scale, zero) = match job.grid {
                    None => (None, None),
                    Some(grid) => {
                        let scale = match grid.scale_type {
                            ElementType::F32 => level.f32s(level.load_words(&*parameters.cast())),
                            ElementType::F16 => level.load_f16(&*parameters.cast()),
                            ElementType::Bf16 => level.load_bf16(&*parameters.cast()),
                        };
                        let zero = parameters.add(LANES * grid.scale_type.bits() / 8);
                        (Some(scale), grid.zero_points.then(|| level.load_i8(&*zero.cast())))
                    }
                };
                for row in 0..ROWS {
                    let tile = &mut *job.tile.add((row * PANELS + panel) * LANES).cast::<[f32; LANES]>();
                    let mut sum = sums[row][panel];
                    if let Some(zero) = zero {
                        let block_sum = *job.block_sums.add(row * job.x_stride + block);
                        sum = zero.mul_add(level.splat(-block_sum), sum);
                    }
                    let total = level.load(tile);
                    match scale {
                        Some(scale) => sum.mul_add(scale, total),
                        None => total.add(sum),
                    }
                    .store(tile);
                }
            }
            block_start += job.grid.map_or(0, GridParameters::bytes);
        }
    }
}
