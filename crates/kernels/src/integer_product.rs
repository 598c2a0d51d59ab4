use crate::grid_parameters::{BlockGrid, GridParameters};
use crate::integer_encoding::IntegerEncoding;
use crate::integer_level::IntegerLevel;
use crate::packed_input::QuantizedBlock;
use crate::packed_matrix::{ColumnLayout, PanelEncoding};
use crate::vector::{LANES, Vector};

/// Adds the products of one panel with some rows of int8 activations to a tile of outputs.
///
/// Sums of a block are exact integers, and blocks are added to an output in their order: the same bits whatever the
/// number of rows, at every level.
///
/// # Safety
/// The CPU must have the level, and the pointers of the job must reach what its fields promise.
pub(crate) type AccumulateIntegers = unsafe fn(&IntegerJob<'_>);

/// The arguments of [`AccumulateIntegers`].
pub(crate) struct IntegerJob<'a> {
    /// The first block of the panel.
    pub(crate) panel: *const u8,
    /// Steps of each block, which has up to [`ColumnLayout::INTEGER_BLOCK_COLUMNS`] columns.
    pub(crate) steps: &'a [u32],
    /// What stands after the codes of each block.
    pub(crate) grid: GridParameters,
    /// What codes stand for, where the encoding is [`Table4`](crate::codec::Table4).
    pub(crate) table: &'a [i8; 16],
    /// The first word of the first row of x: four columns of i8.
    pub(crate) x: *const u32,
    /// The blocks of the first row of x.
    pub(crate) blocks: *const QuantizedBlock,
    /// Words from a row of x to the next, and from its blocks to the next row's.
    pub(crate) x_stride: usize,
    /// Rows of x.
    pub(crate) rows: usize,
    /// `[rows][32]`.
    pub(crate) tile: *mut f32,
}

/// The functions of a level for products in int8.
pub(crate) struct IntegerProducts {
    /// From so many rows on, codes are unpacked into a strip; fewer take passes of up to `most_rows` over a panel.
    pub(crate) least_strip_rows: usize,
    /// Most rows that fit into registers.
    pub(crate) most_rows: usize,
    /// Products of `rows` rows, up to `most_rows`, unpacked in registers.
    pub(crate) accumulate: fn(PanelEncoding, rows: usize) -> AccumulateIntegers,
    /// Products of any number of rows.
    pub(crate) accumulate_strip: fn(PanelEncoding) -> AccumulateIntegers,
}

impl IntegerJob<'_> {
    /// # Safety
    /// See [`AccumulateIntegers`].
    #[inline(always)]
    unsafe fn block(&self, row: usize, block: usize) -> QuantizedBlock {
        // SAFETY: the blocks of a row lie one after another, those of the next row a stride of words further.
        unsafe { *self.blocks.cast::<u32>().add(row * self.x_stride).cast::<QuantizedBlock>().add(block) }
    }
}

/// The parameters of a block in memory.
type BlockArrays = BlockGrid<[f32; LANES]>;

impl BlockArrays {
    /// Adds the sums of a block over some rows of x and the registers from row `first` of the panel on to `totals`, whose
    /// rows of x are 32 apart: `scale · x_scale · (sum − zero · x_sum) + offset · (x_scale · x_sum)`.
    ///
    /// # Safety
    /// `totals` must reach every row.
    #[inline(always)]
    unsafe fn add<L: IntegerLevel, const ROWS: usize, const REGISTERS: usize>(
        &self,
        level: L,
        sums: &[[L::Sums; REGISTERS]; ROWS],
        blocks: &[QuantizedBlock; ROWS],
        first: usize,
        totals: *mut f32,
    ) {
        // SAFETY: the arrays hold a value for each row of a panel, and the caller's pointer reaches all of them.
        unsafe {
            if let Some(offsets) = &self.offsets {
                for row in 0..ROWS {
                    let factor = blocks[row].scale * blocks[row].sum as f32;
                    for register in 0..REGISTERS {
                        let at = first + register * L::ROWS;
                        level.add_product(offsets[at..].as_ptr(), factor, totals.add(row * LANES + at));
                    }
                }
            }
            if let Some(zero_points) = &self.zero_points {
                for row in 0..ROWS {
                    for register in 0..REGISTERS {
                        let at = first + register * L::ROWS;
                        let values = level.floats(sums[row][register]);
                        let values = level.subtract(values, zero_points[at..].as_ptr(), blocks[row].sum as f32);
                        let scales = self.scales[at..].as_ptr();
                        level.add_scaled(values, scales, blocks[row].scale, totals.add(row * LANES + at));
                    }
                }
                return;
            }
            for row in 0..ROWS {
                for register in 0..REGISTERS {
                    let at = first + register * L::ROWS;
                    let values = level.floats(sums[row][register]);
                    let scales = self.scales[at..].as_ptr();
                    level.add_scaled(values, scales, blocks[row].scale, totals.add(row * LANES + at));
                }
            }
        }
    }
}

/// The body of [`IntegerProducts::accumulate`] for `ROWS` rows of x and a panel of `REGISTERS` registers.
///
/// # Safety
/// See [`AccumulateIntegers`].
#[inline(always)]
pub(crate) unsafe fn accumulate<L, E, const ROWS: usize, const REGISTERS: usize>(job: &IntegerJob<'_>)
where
    L: IntegerLevel,
    E: IntegerEncoding<L>,
{
    const { assert!(REGISTERS * L::ROWS == LANES && E::RUN >= E::QUADS) };
    // SAFETY: the caller has the level, and the job's pointers reach every block and row of it.
    unsafe {
        let level = L::assume();
        let state = E::state(level, job.table);
        let mut panel = job.panel;
        let mut x = [job.x; ROWS];
        for row in 0..ROWS {
            x[row] = job.x.add(row * job.x_stride);
        }
        for (block, &steps) in job.steps.iter().enumerate() {
            let mut inputs = [QuantizedBlock::default(); ROWS];
            let mut sums = [[level.splat_sum(0); REGISTERS]; ROWS];
            for row in 0..ROWS {
                inputs[row] = job.block(row, block);
                sums[row] = [level.splat_sum(-E::CENTRE * inputs[row].sum); REGISTERS];
            }
            let mut left = steps as usize;
            while left > 0 {
                let run = left.min(E::RUN / E::QUADS);
                let mut partial = open::<L, E, ROWS, REGISTERS>(level, &sums);
                for _ in 0..run / UNROLLED_STEPS {
                    for step_index in 0..UNROLLED_STEPS {
                        step::<L, E, ROWS, REGISTERS>(level, state, panel, &x, step_index, &mut partial);
                    }
                    panel = panel.add(UNROLLED_STEPS * 4 * LANES);
                    for row in 0..ROWS {
                        x[row] = x[row].add(UNROLLED_STEPS * E::QUADS);
                    }
                }
                for _ in 0..run % UNROLLED_STEPS {
                    step::<L, E, ROWS, REGISTERS>(level, state, panel, &x, 0, &mut partial);
                    panel = panel.add(4 * LANES);
                    for row in 0..ROWS {
                        x[row] = x[row].add(E::QUADS);
                    }
                }
                for row in 0..ROWS {
                    for register in 0..REGISTERS {
                        sums[row][register] = E::close(level, sums[row][register], partial[row][register]);
                    }
                }
                left -= run;
            }
            let grid = job.grid.load(level, panel).map(Vector::to_array);
            panel = panel.add(job.grid.bytes());
            grid.add::<L, ROWS, REGISTERS>(level, &sums, &inputs, 0, job.tile);
        }
    }
}

/// Steps that are written out one after another, with constant addresses: a run of 4-bit codes at AVX2.
const UNROLLED_STEPS: usize = 4;

/// What a run that follows `sums` starts with. A loop, because `array::map` is not compiled for the level.
#[inline(always)]
fn open<L, E, const ROWS: usize, const REGISTERS: usize>(
    level: L,
    sums: &[[L::Sums; REGISTERS]; ROWS],
) -> [[E::Partial; REGISTERS]; ROWS]
where
    L: IntegerLevel,
    E: IntegerEncoding<L>,
{
    let mut partial = [[E::open(level, sums[0][0]); REGISTERS]; ROWS];
    for row in 0..ROWS {
        for register in 0..REGISTERS {
            partial[row][register] = E::open(level, sums[row][register]);
        }
    }
    partial
}

/// Adds the products of one step, the one at `index` from `panel` and `x` on.
#[inline(always)]
unsafe fn step<L, E, const ROWS: usize, const REGISTERS: usize>(
    level: L,
    state: E::State,
    panel: *const u8,
    x: &[*const u32; ROWS],
    index: usize,
    partial: &mut [[E::Partial; REGISTERS]; ROWS],
) where
    L: IntegerLevel,
    E: IntegerEncoding<L>,
{
    for register in 0..REGISTERS {
        // SAFETY: the caller's pointers are good for one step.
        unsafe {
            let words = level.load_codes(panel.add((index * LANES + register * L::ROWS) * 4));
            let at = index * E::QUADS;
            // Written out, because shifts by a constant need a constant quad.
            add::<L, E, ROWS, REGISTERS>(level, E::unpack::<0>(level, state, words), register, x, at, partial);
            if E::QUADS > 1 {
                add::<L, E, ROWS, REGISTERS>(level, E::unpack::<1>(level, state, words), register, x, at + 1, partial);
            }
            if E::QUADS > 2 {
                add::<L, E, ROWS, REGISTERS>(level, E::unpack::<2>(level, state, words), register, x, at + 2, partial);
                add::<L, E, ROWS, REGISTERS>(level, E::unpack::<3>(level, state, words), register, x, at + 3, partial);
            }
        }
    }
}

/// Adds the products of four columns of one register, those at `at` from `x` on. No closure, because those are not
/// always compiled for the level.
#[inline(always)]
unsafe fn add<L, E, const ROWS: usize, const REGISTERS: usize>(
    level: L,
    codes: L::Codes,
    register: usize,
    x: &[*const u32; ROWS],
    at: usize,
    partial: &mut [[E::Partial; REGISTERS]; ROWS],
) where
    L: IntegerLevel,
    E: IntegerEncoding<L>,
{
    for row in 0..ROWS {
        // SAFETY: the caller's pointers are good for these columns.
        let x = unsafe { *x[row].add(at) };
        partial[row][register] = E::multiply(level, partial[row][register], codes, x);
    }
}

/// The codes of a block, unpacked: `[quad][32 rows][4 columns]`.
#[repr(align(64))]
struct Strip([[u8; 4 * LANES]; ColumnLayout::INTEGER_BLOCK_COLUMNS / 4]);

/// The body of [`IntegerProducts::accumulate_strip`]: each block is unpacked into the cache of the core once, and
/// tiles of up to `ROWS` rows of x, at most 12, and `REGISTERS` registers run over it.
///
/// # Safety
/// See [`AccumulateIntegers`].
#[inline(always)]
pub(crate) unsafe fn accumulate_strip<L, E, const ROWS: usize, const REGISTERS: usize>(job: &IntegerJob<'_>)
where
    L: IntegerLevel,
    E: IntegerEncoding<L>,
{
    const { assert!(ROWS <= 12 && LANES.is_multiple_of(REGISTERS * L::ROWS)) };
    // SAFETY: the caller has the level, and the job's pointers reach every block and row of it.
    unsafe {
        let level = L::assume();
        let state = E::state(level, job.table);
        let mut strip = Strip([[0; 4 * LANES]; ColumnLayout::INTEGER_BLOCK_COLUMNS / 4]);
        let (mut panel, mut x_start) = (job.panel, 0);
        for (block, &steps) in job.steps.iter().enumerate() {
            let quads = steps as usize * E::QUADS;
            for step in strip.0[..quads].chunks_exact_mut(E::QUADS) {
                unpack::<L, E>(level, state, panel, step);
                panel = panel.add(4 * LANES);
            }
            let grid = job.grid.load(level, panel).map(Vector::to_array);
            panel = panel.add(job.grid.bytes());
            let tiles = job.rows.div_ceil(ROWS);
            for tile in 0..tiles {
                let start = tile * job.rows / tiles;
                let rows = (tile + 1) * job.rows / tiles - start;
                for first in (0..LANES).step_by(REGISTERS * L::ROWS) {
                    let tile = TileJob { job, strip: &strip.0[..quads], grid: &grid, block, x_start, start, first };
                    match rows {
                        1 => tile.multiply::<L, E, 1, REGISTERS>(level),
                        2 => tile.multiply::<L, E, 2, REGISTERS>(level),
                        3 => tile.multiply::<L, E, 3, REGISTERS>(level),
                        4 if ROWS >= 4 => tile.multiply::<L, E, 4, REGISTERS>(level),
                        5 if ROWS >= 5 => tile.multiply::<L, E, 5, REGISTERS>(level),
                        6 if ROWS >= 6 => tile.multiply::<L, E, 6, REGISTERS>(level),
                        7 if ROWS >= 7 => tile.multiply::<L, E, 7, REGISTERS>(level),
                        8 if ROWS >= 8 => tile.multiply::<L, E, 8, REGISTERS>(level),
                        9 if ROWS >= 9 => tile.multiply::<L, E, 9, REGISTERS>(level),
                        10 if ROWS >= 10 => tile.multiply::<L, E, 10, REGISTERS>(level),
                        11 if ROWS >= 11 => tile.multiply::<L, E, 11, REGISTERS>(level),
                        _ => tile.multiply::<L, E, ROWS, REGISTERS>(level),
                    }
                }
            }
            x_start += quads;
        }
    }
}

/// Unpacks a step, one quad after another.
#[inline(always)]
unsafe fn unpack<L, E>(level: L, state: E::State, panel: *const u8, out: &mut [[u8; 4 * LANES]])
where
    L: IntegerLevel,
    E: IntegerEncoding<L>,
{
    for first in (0..4 * LANES).step_by(4 * L::ROWS) {
        // SAFETY: the caller's pointer is good for one step, and each quad has room for a word of every row.
        unsafe {
            let words = level.load_codes(panel.add(first));
            level.store_codes(E::unpack::<0>(level, state, words), out[0][first..].as_mut_ptr());
            if E::QUADS > 1 {
                level.store_codes(E::unpack::<1>(level, state, words), out[1][first..].as_mut_ptr());
            }
            if E::QUADS > 2 {
                level.store_codes(E::unpack::<2>(level, state, words), out[2][first..].as_mut_ptr());
                level.store_codes(E::unpack::<3>(level, state, words), out[3][first..].as_mut_ptr());
            }
        }
    }
}

/// Some rows of x with some registers of a strip.
struct TileJob<'a> {
    job: &'a IntegerJob<'a>,
    strip: &'a [[u8; 4 * LANES]],
    grid: &'a BlockArrays,
    block: usize,
    /// The word of a row of x where the block starts.
    x_start: usize,
    /// The first row of x.
    start: usize,
    /// The first row of the panel.
    first: usize,
}

impl TileJob<'_> {
    /// # Safety
    /// The pointers of the job must reach `ROWS` rows from `start` on.
    #[inline(always)]
    unsafe fn multiply<L, E, const ROWS: usize, const REGISTERS: usize>(&self, level: L)
    where
        L: IntegerLevel,
        E: IntegerEncoding<L>,
    {
        // SAFETY: the caller's pointers reach every column of every row, and a quad of the strip holds a word of each
        // of the 32 rows, of which `first` to `first + REGISTERS · L::ROWS` are read.
        unsafe {
            let mut x = [self.job.x; ROWS];
            let mut inputs = [QuantizedBlock::default(); ROWS];
            let mut sums = [[level.splat_sum(0); REGISTERS]; ROWS];
            for row in 0..ROWS {
                x[row] = self.job.x.add((self.start + row) * self.job.x_stride + self.x_start);
                inputs[row] = self.job.block(self.start + row, self.block);
                sums[row] = [level.splat_sum(-E::CENTRE * inputs[row].sum); REGISTERS];
            }
            for run in self.strip.chunks(E::RUN) {
                let mut partial = open::<L, E, ROWS, REGISTERS>(level, &sums);
                let (unrolled, rest) = run.as_chunks::<UNROLLED_QUADS>();
                for quads in unrolled {
                    for index in 0..UNROLLED_QUADS {
                        self.add_quad::<L, E, ROWS, REGISTERS>(level, &quads[index], &x, index, &mut partial);
                    }
                    for row in 0..ROWS {
                        x[row] = x[row].add(UNROLLED_QUADS);
                    }
                }
                for codes in rest {
                    self.add_quad::<L, E, ROWS, REGISTERS>(level, codes, &x, 0, &mut partial);
                    for row in 0..ROWS {
                        x[row] = x[row].add(1);
                    }
                }
                for row in 0..ROWS {
                    for register in 0..REGISTERS {
                        sums[row][register] = E::close(level, sums[row][register], partial[row][register]);
                    }
                }
            }
            let totals = self.job.tile.add(self.start * LANES);
            self.grid.add::<L, ROWS, REGISTERS>(level, &sums, &inputs, self.first, totals);
        }
    }

    /// Adds the products of four columns, those at `index` from `x` on.
    ///
    /// # Safety
    /// Each of `x` must reach the columns.
    #[inline(always)]
    unsafe fn add_quad<L, E, const ROWS: usize, const REGISTERS: usize>(
        &self,
        level: L,
        codes: &[u8; 4 * LANES],
        x: &[*const u32; ROWS],
        index: usize,
        partial: &mut [[E::Partial; REGISTERS]; ROWS],
    ) where
        L: IntegerLevel,
        E: IntegerEncoding<L>,
    {
        // SAFETY: as the caller promises; the codes are a word of each of the 32 rows.
        unsafe {
            let codes = codes.as_ptr().add(4 * self.first);
            let mut registers = [level.load_codes(codes); REGISTERS];
            for register in 1..REGISTERS {
                registers[register] = level.load_codes(codes.add(4 * register * L::ROWS));
            }
            for row in 0..ROWS {
                let x = *x[row].add(index);
                for register in 0..REGISTERS {
                    partial[row][register] = E::multiply(level, partial[row][register], registers[register], x);
                }
            }
        }
    }
}

/// Groups of four columns that are written out one after another, with constant addresses: a run of 4-bit codes at
/// AVX2.
const UNROLLED_QUADS: usize = 8;
