use std::arch::aarch64::*;
use std::arch::asm;

use crate::integer_encoding::IntegerEncoding;
use crate::integer_level::IntegerLevel;
use crate::integer_product::{BlockArrays, BlockRows, unpack_pair};
use crate::integer_strip::IntegerStripJob;
use crate::kernel_table::written_out;
use crate::packed_matrix::ColumnLayout;
use crate::tiled_input::TileBlock;
use crate::vector::{LANES, Vector};

/// The codes of a block, unpacked: `[octet][32 rows][8 columns]`.
#[repr(align(64))]
struct Strip([[u8; 8 * LANES]; MOST_OCTETS]);

/// Groups of eight columns in a block.
const MOST_OCTETS: usize = ColumnLayout::INTEGER_BLOCK_COLUMNS / 8;

/// As [`integer_strip::accumulate_strip`](crate::integer_strip::accumulate_strip), with products of matrices: eight
/// columns of two rows of the panel times those of two rows of x are four sums (`usmmla`), twice as many products as
/// `usdot` has. Sums are exact, so that they come out the same.
///
/// # Safety
/// See [`AccumulateIntegerStrip`](crate::integer_strip::AccumulateIntegerStrip); the CPU must have FEAT_I8MM.
#[inline(always)]
pub(super) unsafe fn accumulate_strip<L, E, const ROWS: usize, const REGISTERS: usize>(job: &IntegerStripJob<'_>)
where
    L: IntegerLevel<Codes = [uint8x16_t; 2], Sums = [int32x4_t; 2]>,
    E: IntegerEncoding<L>,
{
    // Rows of x come in pairs. A tile has room for the second of a pair that lacks it, and its sums are not read.
    const { assert!(ROWS == 6 && LANES.is_multiple_of(REGISTERS * L::ROWS)) };
    // SAFETY: the caller has the level, and the job's pointers reach every block and row of it.
    unsafe {
        let level = L::assume();
        let state = E::state(level, job.table);
        let mut strip = Strip([[0; 8 * LANES]; MOST_OCTETS]);
        let (mut panel, mut x_start) = (job.panel, 0);
        let tiles = job.rows.div_ceil(ROWS);
        for &steps in job.steps {
            let quads = steps as usize * E::QUADS;
            let octets = quads.div_ceil(2);
            // Steps of a single quad are taken in pairs.
            for (index, octets) in strip.0[..octets].chunks_mut((E::QUADS / 2).max(1)).enumerate() {
                let next = E::QUADS == 1 && 2 * index + 1 < quads;
                let step = panel.add(index * E::BYTES * if E::QUADS == 1 { 2 } else { 1 });
                unpack::<L, E>(level, state, step, next, octets);
            }
            panel = panel.add(steps as usize * E::BYTES);
            let grid = job.grid.load(level, panel).map(Vector::to_array);
            panel = panel.add(job.grid.bytes());
            for tile in 0..tiles {
                let start = tile * job.rows / tiles;
                let rows = (tile + 1) * job.rows / tiles - start;
                let x = job.x.add(tile * job.tile_stride + x_start);
                let known = TileBlock::after(x, quads, ROWS);
                let totals = job.tile.add(start * LANES);
                for first in (0..LANES).step_by(REGISTERS * L::ROWS) {
                    let tile = TileJob { strip: &strip.0[..octets], grid: &grid, x, known, first, rows, totals };
                    match rows.div_ceil(2) {
                        1 => tile.multiply::<L, 1, REGISTERS, ROWS>(level),
                        2 => tile.multiply::<L, 2, REGISTERS, ROWS>(level),
                        _ => tile.multiply::<L, 3, REGISTERS, ROWS>(level),
                    }
                }
            }
            x_start += (quads + TileBlock::INTEGER_WORDS) * ROWS;
        }
    }
}

/// Unpacks a step, eight columns after another. Steps of four columns are taken in pairs, or a last one with zeros
/// where there is no `next`.
#[inline(always)]
unsafe fn unpack<L, E>(level: L, state: E::State, step: *const u8, next: bool, out: &mut [[u8; 8 * LANES]])
where
    L: IntegerLevel<Codes = [uint8x16_t; 2]>,
    E: IntegerEncoding<L>,
{
    for first in (0..LANES).step_by(L::ROWS) {
        // SAFETY: the caller's pointer is good for a step, and for the next one where there is one; an octet has room for
        // two words of each row.
        unsafe {
            let words = E::load(level, step.add(4 * first));
            if E::QUADS == 1 {
                let low = E::unpack::<0>(level, state, words);
                let mut high = [vdupq_n_u8(0); 2];
                if next {
                    high = E::unpack::<0>(level, state, E::load(level, step.add(E::BYTES + 4 * first)));
                }
                store([low, high], out[0][8 * first..].as_mut_ptr());
                continue;
            }
            written_out!(PAIR < E::QUADS / 2 => {
                let pair = unpack_pair::<L, E, PAIR>(level, state, words);
                store(pair, out[PAIR as usize][8 * first..].as_mut_ptr());
            });
        }
    }
}

/// Writes the codes of eight rows: a word of each group of four columns in turn.
///
/// # Safety
/// `out` must have room for two words of each row.
#[inline(always)]
unsafe fn store([low, high]: [[uint8x16_t; 2]; 2], out: *mut u8) {
    // SAFETY: as the caller promises.
    unsafe {
        for register in 0..2 {
            let words = uint32x4x2_t(vreinterpretq_u32_u8(low[register]), vreinterpretq_u32_u8(high[register]));
            vst2q_u32(out.add(4 * register * 8).cast(), words);
        }
    }
}

/// A tile of x with some registers of a strip.
struct TileJob<'a> {
    strip: &'a [[u8; 8 * LANES]],
    grid: &'a BlockArrays,
    /// The block of the tile.
    x: *const u32,
    known: TileBlock,
    /// The first row of the panel.
    first: usize,
    /// Rows of x.
    rows: usize,
    /// `[rows][32]`.
    totals: *mut f32,
}

impl TileJob<'_> {
    /// # Safety
    /// The pointers must reach the rows, of which there must be `2 · PAIRS`, or one less, in tiles of `TILE`.
    #[inline(always)]
    unsafe fn multiply<L, const PAIRS: usize, const REGISTERS: usize, const TILE: usize>(&self, level: L)
    where
        L: IntegerLevel<Sums = [int32x4_t; 2]>,
    {
        // SAFETY: the caller's pointers reach every column of every row, and those of the row after an odd last one,
        // for which a tile has room; behind an odd last quad stand the parameters of the block. An octet of the strip
        // holds two words of each of the 32 rows, of which `first` to `first + REGISTERS · L::ROWS` are read.
        unsafe {
            // Rows 0 and 1, 2 and 3, … of each register, times a pair of rows of x.
            let mut sums = [[[vdupq_n_s32(0); 4]; REGISTERS]; PAIRS];
            for pair in 0..PAIRS {
                let starts = vld1_s32(self.known.starts().add(2 * pair));
                sums[pair] = [[vcombine_s32(starts, starts); 4]; REGISTERS];
            }
            let mut x = self.x;
            for codes in self.strip {
                let mut pairs = [vdupq_n_u32(0); PAIRS];
                for pair in 0..PAIRS {
                    let (low, high) = (vld1_u32(x.add(2 * pair)), vld1_u32(x.add(TILE + 2 * pair)));
                    // Both words of one row, then both of the other.
                    pairs[pair] = vzip1q_u32(vcombine_u32(low, low), vcombine_u32(high, high));
                }
                let codes = codes.as_ptr().add(8 * self.first);
                for register in 0..REGISTERS {
                    for rows in 0..4 {
                        let codes = vld1q_u8(codes.add((register * 4 + rows) * 16));
                        for pair in 0..PAIRS {
                            sums[pair][register][rows] = usmmla(sums[pair][register][rows], codes, pairs[pair]);
                        }
                    }
                }
                x = x.add(2 * TILE);
            }
            for pair in 0..PAIRS {
                let mut of_rows = [[level.splat_sum(0); REGISTERS]; 2];
                for register in 0..REGISTERS {
                    let [a, b, c, d] = sums[pair][register];
                    of_rows[0][register] = [vuzp1q_s32(a, b), vuzp1q_s32(c, d)];
                    of_rows[1][register] = [vuzp2q_s32(a, b), vuzp2q_s32(c, d)];
                }
                let blocks = BlockRows {
                    scales: self.known.scales().add(2 * pair),
                    sums: self.known.integer_sums().add(2 * pair),
                    stride: 1,
                };
                let totals = self.totals.add(2 * pair * LANES);
                if 2 * pair + 1 < self.rows {
                    self.grid.add::<L, 2, REGISTERS>(level, &of_rows, blocks, self.first, totals);
                } else {
                    self.grid.add::<L, 1, REGISTERS>(level, &[of_rows[0]], blocks, self.first, totals);
                }
            }
        }
    }
}

/// Adds eight products to each of four sums: two rows of unsigned bytes times two rows of signed ones. The intrinsic is
/// not in Rust yet.
#[inline]
#[target_feature(enable = "i8mm")]
fn usmmla(mut sums: int32x4_t, codes: uint8x16_t, x: uint32x4_t) -> int32x4_t {
    // SAFETY: the instruction is there as the target feature says, and touches registers alone.
    unsafe {
        asm!(
            "usmmla {sums:v}.4s, {codes:v}.16b, {x:v}.16b",
            sums = inout(vreg) sums,
            codes = in(vreg) codes,
            x = in(vreg) x,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sums
}
