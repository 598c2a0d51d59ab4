use crate::grid_parameters::{BlockGrid, GridParameters};
use crate::integer_encoding::IntegerEncoding;
use crate::integer_level::IntegerLevel;
use crate::integer_strip::AccumulateIntegerStrip;
use crate::kernel_table::written_out;
use crate::packed_input::QuantizedBlock;
use crate::packed_matrix::PanelEncoding;
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
    /// Steps of each block.
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
    /// `[rows][32]`.
    pub(crate) tile: *mut f32,
}

/// The functions of a level for products in int8.
pub(crate) struct IntegerProducts {
    /// From so many rows on, codes that a shift and a mask unpack go to a strip; fewer take passes of up to `most_rows`
    /// over a panel.
    pub(crate) least_strip_rows_of_a_word: usize,
    /// Most rows that fit into registers.
    pub(crate) most_rows: usize,
    /// Products of `rows` rows, up to `most_rows`, unpacked in registers.
    pub(crate) accumulate: fn(PanelEncoding, rows: usize) -> AccumulateIntegers,
    /// Rows of a tile of a strip.
    pub(crate) tile_rows: usize,
    /// Products of any number of rows.
    pub(crate) accumulate_strip: fn(PanelEncoding) -> AccumulateIntegerStrip,
    /// What is to be subtracted from the codes of a strip.
    pub(crate) centre: fn(PanelEncoding) -> i32,
}

impl IntegerProducts {
    /// From so many rows on, codes are unpacked into a strip. What takes several words to unpack is not unpacked twice.
    pub(crate) fn least_strip_rows(&self, encoding: PanelEncoding) -> usize {
        let least = self.least_strip_rows_of_a_word;
        if encoding.step_words() > 1 { least.min(self.most_rows + 1) } else { least }
    }
}

/// How some rows of x are rounded in a block. Read where they are needed: a level broadcasts from memory for nothing.
#[derive(Clone, Copy)]
pub(crate) struct BlockRows {
    /// The scale of the first row.
    pub(crate) scales: *const f32,
    /// The sum of the first row.
    pub(crate) sums: *const i32,
    /// Words from a row to the next.
    pub(crate) stride: usize,
}

impl BlockRows {
    /// # Safety
    /// There must be such a row.
    #[inline(always)]
    unsafe fn scale(&self, row: usize) -> f32 {
        // SAFETY: as the caller promises.
        unsafe { *self.scales.add(row * self.stride) }
    }

    /// # Safety
    /// There must be such a row.
    #[inline(always)]
    unsafe fn sum(&self, row: usize) -> i32 {
        // SAFETY: as the caller promises.
        unsafe { *self.sums.add(row * self.stride) }
    }
}

/// The parameters of a block in memory.
pub(crate) type BlockArrays = BlockGrid<[f32; LANES]>;

impl BlockArrays {
    /// Adds the sums of a block over some rows of x and the registers from row `first` of the panel on to `totals`, whose
    /// rows of x are 32 apart: `scale · x_scale · (sum − zero · x_sum) + offset · (x_scale · x_sum)`.
    ///
    /// # Safety
    /// `blocks` and `totals` must reach every row.
    #[inline(always)]
    pub(crate) unsafe fn add<L: IntegerLevel, const ROWS: usize, const REGISTERS: usize>(
        &self,
        level: L,
        sums: &[[L::Sums; REGISTERS]; ROWS],
        blocks: BlockRows,
        first: usize,
        totals: *mut f32,
    ) {
        // SAFETY: the arrays hold a value for each row of a panel, and the caller's pointers reach all of them.
        unsafe {
            if let Some(offsets) = &self.offsets {
                for row in 0..ROWS {
                    let factor = blocks.scale(row) * blocks.sum(row) as f32;
                    for register in 0..REGISTERS {
                        let at = first + register * L::ROWS;
                        level.add_product(offsets[at..].as_ptr(), factor, totals.add(row * LANES + at));
                    }
                }
            }
            if let Some(zero_points) = &self.zero_points {
                for row in 0..ROWS {
                    let (x_scale, x_sum) = (blocks.scale(row), blocks.sum(row) as f32);
                    for register in 0..REGISTERS {
                        let at = first + register * L::ROWS;
                        let values = level.floats(sums[row][register]);
                        let values = level.subtract(values, zero_points[at..].as_ptr(), x_sum);
                        let scales = self.scales[at..].as_ptr();
                        level.add_scaled(values, scales, x_scale, totals.add(row * LANES + at));
                    }
                }
                return;
            }
            for row in 0..ROWS {
                let x_scale = blocks.scale(row);
                for register in 0..REGISTERS {
                    let at = first + register * L::ROWS;
                    let values = level.floats(sums[row][register]);
                    let scales = self.scales[at..].as_ptr();
                    level.add_scaled(values, scales, x_scale, totals.add(row * LANES + at));
                }
            }
        }
    }
}

/// The body of [`IntegerProducts::accumulate`] for `ROWS` rows of x and a panel of `REGISTERS` registers.
///
/// Pairs of groups of four columns take turns between up to four sets of sums, which are added up at the end of a run:
/// with few rows, a single set would be one long chain of additions.
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
            // The blocks of a row lie one after another, those of the next row a stride of words further.
            let first = job.blocks.add(block);
            let (scales, block_sums) = (&raw const (*first).scale, &raw const (*first).sum);
            let inputs = BlockRows { scales, sums: block_sums, stride: job.x_stride };
            let mut sums = [[level.splat_sum(0); REGISTERS]; ROWS];
            for row in 0..ROWS {
                sums[row] = [level.splat_sum(-E::CENTRE * inputs.sum(row)); REGISTERS];
            }
            let mut left = steps as usize;
            while left > 0 {
                let run = left.min(E::RUN / E::QUADS);
                let none = [[level.splat_sum(0); REGISTERS]; ROWS];
                let mut partial = [open::<L, E, ROWS, REGISTERS>(level, &none); MOST_CHAINS];
                partial[0] = open::<L, E, ROWS, REGISTERS>(level, &sums);
                let unrolled = const { unrolled_steps::<L, E>() };
                for _ in 0..run / unrolled {
                    if L::WRITTEN_OUT {
                        written_out!(INDEX < const { unrolled_steps::<L, E>() } => {
                            step::<L, E, ROWS, REGISTERS>(level, state, panel, &x, INDEX as usize, &mut partial);
                        });
                    } else {
                        for index in 0..unrolled {
                            step::<L, E, ROWS, REGISTERS>(level, state, panel, &x, index, &mut partial);
                        }
                    }
                    panel = panel.add(unrolled * E::BYTES);
                    for row in 0..ROWS {
                        x[row] = x[row].add(unrolled * E::QUADS);
                    }
                }
                for _ in 0..run % unrolled {
                    step::<L, E, ROWS, REGISTERS>(level, state, panel, &x, 0, &mut partial);
                    panel = panel.add(E::BYTES);
                    for row in 0..ROWS {
                        x[row] = x[row].add(E::QUADS);
                    }
                }
                for row in 0..ROWS {
                    for register in 0..REGISTERS {
                        let mut sum = E::close(level, sums[row][register], partial[0][row][register]);
                        for chain in 1..const { chains::<L, E>(ROWS * REGISTERS) } {
                            let more = E::close(level, none[row][register], partial[chain][row][register]);
                            sum = level.add_sums(sum, more);
                        }
                        sums[row][register] = sum;
                    }
                }
                left -= run;
            }
            let grid = job.grid.load(level, panel).map(Vector::to_array);
            panel = panel.add(job.grid.bytes());
            grid.add::<L, ROWS, REGISTERS>(level, &sums, inputs, 0, job.tile);
        }
    }
}

/// How many sets of so many sums a level wants.
const fn chains<L: IntegerLevel, E: IntegerEncoding<L>>(sums: usize) -> usize {
    let wanted = L::SUMS_UNDER_WAY.div_ceil(sums);
    let turns = unrolled_steps::<L, E>() * E::QUADS.div_ceil(2);
    let most = if turns < MOST_CHAINS { turns } else { MOST_CHAINS };
    if wanted < most { wanted } else { most }
}

/// Most sets of sums.
const MOST_CHAINS: usize = 4;

/// Steps that are written out one after another, with constant addresses: up to four, of up to eight groups of four
/// columns together, which is a run of codes of 4 bits at AVX2.
const fn unrolled_steps<L: IntegerLevel, E: IntegerEncoding<L>>() -> usize {
    const { assert!(E::RUN >= 8 && E::QUADS <= 8) };
    if E::QUADS > 2 { 8 / E::QUADS } else { 4 }
}

/// What a run that follows `sums` starts with. A loop, because `array::map` is not compiled for the level.
#[inline(always)]
pub(crate) fn open<L, E, const ROWS: usize, const REGISTERS: usize>(
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
    partial: &mut [[[E::Partial; REGISTERS]; ROWS]; MOST_CHAINS],
) where
    L: IntegerLevel,
    E: IntegerEncoding<L>,
{
    L::PREFETCH.ahead_of(panel.wrapping_add(index * E::BYTES), E::BYTES);
    // SAFETY: the caller's pointers are good for one step.
    unsafe {
        if L::WRITTEN_OUT {
            written_out!(REGISTER < REGISTERS => {
                step_of_register::<L, E, ROWS, REGISTERS>(level, state, panel, x, index, REGISTER as usize, partial);
            });
        } else {
            for register in 0..REGISTERS {
                step_of_register::<L, E, ROWS, REGISTERS>(level, state, panel, x, index, register, partial);
            }
        }
    }
}

#[inline(always)]
unsafe fn step_of_register<L, E, const ROWS: usize, const REGISTERS: usize>(
    level: L,
    state: E::State,
    panel: *const u8,
    x: &[*const u32; ROWS],
    index: usize,
    register: usize,
    partial: &mut [[[E::Partial; REGISTERS]; ROWS]; MOST_CHAINS],
) where
    L: IntegerLevel,
    E: IntegerEncoding<L>,
{
    let at = index * E::QUADS;
    let chains = const { chains::<L, E>(ROWS * REGISTERS) };
    // SAFETY: as the caller promises; the words of the rows of a register follow those of the registers before it.
    unsafe {
        let words = E::load(level, panel.add(index * E::BYTES + register * L::ROWS * 4));
        if E::QUADS == 1 {
            let sums = &mut partial[index % chains];
            add::<L, E, ROWS, REGISTERS, 1>(level, [E::unpack::<0>(level, state, words)], register, x, at, sums);
            return;
        }
        // Written out, because shifts by a constant need a constant quad.
        written_out!(PAIR < E::QUADS / 2 => {
            let pair = unpack_pair::<L, E, PAIR>(level, state, words);
            let at = at + 2 * PAIR as usize;
            let sums = &mut partial[at / 2 % chains];
            if E::IN_PAIRS {
                add::<L, E, ROWS, REGISTERS, 2>(level, pair, register, x, at, sums);
            } else {
                add::<L, E, ROWS, REGISTERS, 1>(level, [pair[0]], register, x, at, sums);
                add::<L, E, ROWS, REGISTERS, 1>(level, [pair[1]], register, x, at + 1, sums);
            }
        });
    }
}

/// Two groups of four columns, `2·PAIR` and `2·PAIR + 1`.
#[inline(always)]
pub(crate) fn unpack_pair<L, E, const PAIR: u32>(level: L, state: E::State, words: E::Words) -> [L::Codes; 2]
where
    L: IntegerLevel,
    E: IntegerEncoding<L>,
{
    match PAIR {
        0 => [E::unpack::<0>(level, state, words), E::unpack::<1>(level, state, words)],
        1 => [E::unpack::<2>(level, state, words), E::unpack::<3>(level, state, words)],
        2 => [E::unpack::<4>(level, state, words), E::unpack::<5>(level, state, words)],
        _ => [E::unpack::<6>(level, state, words), E::unpack::<7>(level, state, words)],
    }
}

/// Adds the products of some groups of four columns of one register, those at `at` from `x` on. No closure, because
/// those are not always compiled for the level.
#[inline(always)]
unsafe fn add<L, E, const ROWS: usize, const REGISTERS: usize, const QUADS: usize>(
    level: L,
    codes: [L::Codes; QUADS],
    register: usize,
    x: &[*const u32; ROWS],
    at: usize,
    partial: &mut [[E::Partial; REGISTERS]; ROWS],
) where
    L: IntegerLevel,
    E: IntegerEncoding<L>,
{
    for row in 0..ROWS {
        let mut of_row = [0; QUADS];
        for quad in 0..QUADS {
            // SAFETY: the caller's pointers are good for these columns.
            of_row[quad] = unsafe { *x[row].add(at + quad) };
        }
        partial[row][register] = E::multiply::<QUADS>(level, partial[row][register], codes, of_row);
    }
}
