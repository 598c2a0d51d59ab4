use crate::grid_parameters::GridParameters;
use crate::integer_encoding::IntegerEncoding;
use crate::integer_level::IntegerLevel;
use crate::integer_product::{BlockArrays, BlockRows, open, unpack_pair};
use crate::kernel_table::written_out;
use crate::packed_matrix::ColumnLayout;
use crate::prefetch::prefetch;
use crate::tiled_input::TileBlock;
use crate::vector::{LANES, Vector};

/// Adds the products of one panel with many rows of int8 activations to a tile of outputs: the same additions, bit for
/// bit, as those of an [`AccumulateIntegers`](crate::integer_product::AccumulateIntegers).
///
/// # Safety
/// The CPU must have the level, and the pointers of the job must reach what its fields promise.
pub(crate) type AccumulateIntegerStrip = unsafe fn(&IntegerStripJob<'_>);

/// The arguments of [`AccumulateIntegerStrip`].
pub(crate) struct IntegerStripJob<'a> {
    /// The first block of the panel.
    pub(crate) panel: *const u8,
    /// Steps of each block, which has up to [`ColumnLayout::INTEGER_BLOCK_COLUMNS`] columns.
    pub(crate) steps: &'a [u32],
    /// What stands after the codes of each block.
    pub(crate) grid: GridParameters,
    /// What codes stand for, where the encoding is [`Table4`](crate::codec::Table4).
    pub(crate) table: &'a [i8; 16],
    /// The first word of a [`TiledInput`](crate::tiled_input::TiledInput).
    pub(crate) x: *const u32,
    /// Words from a tile of x to the next.
    pub(crate) tile_stride: usize,
    /// Rows of x.
    pub(crate) rows: usize,
    /// `[rows][32]`.
    pub(crate) tile: *mut f32,
}

/// The codes of a block, unpacked: `[quad][32 rows][4 columns]`.
#[repr(align(64))]
struct Strip([[u8; 4 * LANES]; MOST_QUADS]);

/// Groups of four columns in a block.
const MOST_QUADS: usize = ColumnLayout::INTEGER_BLOCK_COLUMNS / 4;

/// The body of [`AccumulateIntegerStrip`]: each block is unpacked into the cache of the core once, and tiles of up to
/// `ROWS` rows of x, at most 12, and `REGISTERS` registers run over it.
///
/// # Safety
/// See [`AccumulateIntegerStrip`].
#[inline(always)]
pub(crate) unsafe fn accumulate_strip<L, E, const ROWS: usize, const REGISTERS: usize>(job: &IntegerStripJob<'_>)
where
    L: IntegerLevel,
    E: IntegerEncoding<L>,
{
    const { assert!(ROWS <= 12 && LANES.is_multiple_of(REGISTERS * L::ROWS)) };
    // SAFETY: the caller has the level, and the job's pointers reach every block and row of it.
    unsafe {
        let level = L::assume();
        let state = E::state(level, job.table);
        let mut strip = Strip([[0; 4 * LANES]; MOST_QUADS]);
        let (mut panel, mut x_start) = (job.panel, 0);
        let tiles = job.rows.div_ceil(ROWS);
        for &steps in job.steps {
            let quads = steps as usize * E::QUADS;
            for step in strip.0[..quads].chunks_exact_mut(E::QUADS) {
                unpack::<L, E>(level, state, panel, step);
                panel = panel.add(E::BYTES);
            }
            let grid = job.grid.load(level, panel).map(Vector::to_array);
            panel = panel.add(job.grid.bytes());
            prefetch::<true>(panel, steps as usize * E::BYTES);
            let block_words = (quads + TileBlock::INTEGER_WORDS) * ROWS;
            for tile in 0..tiles {
                let start = tile * job.rows / tiles;
                let rows = (tile + 1) * job.rows / tiles - start;
                let x = job.x.wrapping_add(tile * job.tile_stride + x_start);
                let next = if tile + 1 < tiles {
                    x.wrapping_add(job.tile_stride)
                } else {
                    job.x.wrapping_add(x_start + block_words)
                };
                for first in (0..LANES).step_by(REGISTERS * L::ROWS) {
                    let totals = job.tile.add(start * LANES);
                    let tile = TileJob { strip: &strip.0[..quads], grid: &grid, x, next, first, totals };
                    match rows {
                        1 => tile.multiply::<L, E, 1, REGISTERS, ROWS>(level),
                        2 => tile.multiply::<L, E, 2, REGISTERS, ROWS>(level),
                        3 => tile.multiply::<L, E, 3, REGISTERS, ROWS>(level),
                        4 if ROWS >= 4 => tile.multiply::<L, E, 4, REGISTERS, ROWS>(level),
                        5 if ROWS >= 5 => tile.multiply::<L, E, 5, REGISTERS, ROWS>(level),
                        6 if ROWS >= 6 => tile.multiply::<L, E, 6, REGISTERS, ROWS>(level),
                        7 if ROWS >= 7 => tile.multiply::<L, E, 7, REGISTERS, ROWS>(level),
                        8 if ROWS >= 8 => tile.multiply::<L, E, 8, REGISTERS, ROWS>(level),
                        9 if ROWS >= 9 => tile.multiply::<L, E, 9, REGISTERS, ROWS>(level),
                        10 if ROWS >= 10 => tile.multiply::<L, E, 10, REGISTERS, ROWS>(level),
                        11 if ROWS >= 11 => tile.multiply::<L, E, 11, REGISTERS, ROWS>(level),
                        _ => tile.multiply::<L, E, ROWS, REGISTERS, ROWS>(level),
                    }
                }
            }
            x_start += block_words;
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
            let words = E::load(level, panel.add(first));
            if E::QUADS == 1 {
                level.store_codes(E::unpack::<0>(level, state, words), out[0][first..].as_mut_ptr());
                continue;
            }
            written_out!(PAIR < E::QUADS / 2 => {
                let pair = unpack_pair::<L, E, PAIR>(level, state, words);
                level.store_codes(pair[0], out[2 * PAIR as usize][first..].as_mut_ptr());
                level.store_codes(pair[1], out[2 * PAIR as usize + 1][first..].as_mut_ptr());
            });
        }
    }
}

/// A tile of x with some registers of a strip.
struct TileJob<'a> {
    strip: &'a [[u8; 4 * LANES]],
    grid: &'a BlockArrays,
    /// The block of the tile.
    x: *const u32,
    /// What comes after it: the same block of the next tile, or the next block of the first.
    next: *const u32,
    /// The first row of the panel.
    first: usize,
    /// `[rows][32]`.
    totals: *mut f32,
}

impl TileJob<'_> {
    /// # Safety
    /// The pointers must reach `ROWS` rows, in tiles of `TILE`.
    #[inline(always)]
    unsafe fn multiply<L, E, const ROWS: usize, const REGISTERS: usize, const TILE: usize>(&self, level: L)
    where
        L: IntegerLevel,
        E: IntegerEncoding<L>,
    {
        // SAFETY: the caller's pointers reach every column of every row, and a quad of the strip holds a word of each
        // of the 32 rows, of which `first` to `first + REGISTERS · L::ROWS` are read.
        unsafe {
            let block = TileBlock::after(self.x, self.strip.len(), TILE);
            let mut sums = [[level.splat_sum(0); REGISTERS]; ROWS];
            for row in 0..ROWS {
                sums[row] = [level.splat_sum(*block.starts().add(row)); REGISTERS];
            }
            if E::RUN >= MOST_QUADS {
                self.add_run::<L, E, ROWS, REGISTERS, TILE>(level, self.strip, self.x, &mut sums);
            } else {
                let mut x = self.x;
                for run in self.strip.chunks(E::RUN) {
                    self.add_run::<L, E, ROWS, REGISTERS, TILE>(level, run, x, &mut sums);
                    x = x.add(run.len() * TILE);
                }
            }
            let rows = BlockRows { scales: block.scales(), sums: block.integer_sums(), stride: 1 };
            self.grid.add::<L, ROWS, REGISTERS>(level, &sums, rows, self.first, self.totals);
        }
    }

    /// Adds the products of a run of columns.
    ///
    /// # Safety
    /// `x` must reach the columns.
    #[inline(always)]
    unsafe fn add_run<L, E, const ROWS: usize, const REGISTERS: usize, const TILE: usize>(
        &self,
        level: L,
        run: &[[u8; 4 * LANES]],
        mut x: *const u32,
        sums: &mut [[L::Sums; REGISTERS]; ROWS],
    ) where
        L: IntegerLevel,
        E: IntegerEncoding<L>,
    {
        // SAFETY: as the caller promises.
        unsafe {
            let mut partial = open::<L, E, ROWS, REGISTERS>(level, sums);
            let (unrolled, rest) = run.as_chunks::<UNROLLED_QUADS>();
            for quads in unrolled {
                if self.first == 0 {
                    let at = x.offset_from(self.x) as usize;
                    prefetch::<true>(self.next.wrapping_add(at).cast(), UNROLLED_QUADS * TILE * 4);
                }
                if E::IN_PAIRS {
                    for (index, pair) in quads.as_chunks::<2>().0.iter().enumerate() {
                        self.add_quads::<L, E, ROWS, REGISTERS, TILE, 2>(
                            level,
                            pair,
                            x.add(2 * index * TILE),
                            &mut partial,
                        );
                    }
                } else {
                    for (index, quad) in quads.as_chunks::<1>().0.iter().enumerate() {
                        self.add_quads::<L, E, ROWS, REGISTERS, TILE, 1>(
                            level,
                            quad,
                            x.add(index * TILE),
                            &mut partial,
                        );
                    }
                }
                x = x.add(UNROLLED_QUADS * TILE);
            }
            if E::IN_PAIRS {
                for pair in rest.as_chunks::<2>().0 {
                    self.add_quads::<L, E, ROWS, REGISTERS, TILE, 2>(level, pair, x, &mut partial);
                    x = x.add(2 * TILE);
                }
            } else {
                for quad in rest.as_chunks::<1>().0 {
                    self.add_quads::<L, E, ROWS, REGISTERS, TILE, 1>(level, quad, x, &mut partial);
                    x = x.add(TILE);
                }
            }
            for row in 0..ROWS {
                for register in 0..REGISTERS {
                    sums[row][register] = E::close(level, sums[row][register], partial[row][register]);
                }
            }
        }
    }

    /// Adds the products of some groups of four columns, `x` of each row.
    ///
    /// # Safety
    /// `x` must reach every row of each group.
    #[inline(always)]
    unsafe fn add_quads<L, E, const ROWS: usize, const REGISTERS: usize, const TILE: usize, const QUADS: usize>(
        &self,
        level: L,
        codes: &[[u8; 4 * LANES]; QUADS],
        x: *const u32,
        partial: &mut [[E::Partial; REGISTERS]; ROWS],
    ) where
        L: IntegerLevel,
        E: IntegerEncoding<L>,
    {
        // SAFETY: as the caller promises; each of the codes is a word of each of the 32 rows.
        unsafe {
            let mut registers = [[level.load_codes(codes[0].as_ptr()); QUADS]; REGISTERS];
            for register in 0..REGISTERS {
                for quad in 0..QUADS {
                    let first = self.first + register * L::ROWS;
                    registers[register][quad] = level.load_codes(codes[quad].as_ptr().add(4 * first));
                }
            }
            for row in 0..ROWS {
                let mut of_row = [0; QUADS];
                for quad in 0..QUADS {
                    of_row[quad] = *x.add(quad * TILE + row);
                }
                for register in 0..REGISTERS {
                    partial[row][register] =
                        E::multiply::<QUADS>(level, partial[row][register], registers[register], of_row);
                }
            }
        }
    }
}

/// Groups of four columns that are written out one after another, with constant addresses: a run of 4-bit codes at
/// AVX2.
const UNROLLED_QUADS: usize = 8;
