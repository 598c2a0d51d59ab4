use std::arch::x86_64::*;

use super::bf16_codec::{Bf16Encoding, as_bf16};
use super::vector::{Avx512, F32x16, U32x32};
use crate::grid_parameters::{BlockGrid, GridParameters};
use crate::kernel_table::written_out;
use crate::packed_matrix::ColumnLayout;
use crate::strip::{StripJob, add_block};
use crate::tiled_input::TileBlock;
use crate::vector::{LANES, Level, Vector};

/// Rows of a tile: with both registers of a panel they leave room for a pair of columns and for x.
pub(super) const TILE_ROWS: usize = 12;

/// Pairs of columns of a block, unpacked: `[pair][32]` words of two bf16.
#[repr(align(64))]
struct Strip([[u32; LANES]; ColumnLayout::BLOCK_COLUMNS / 2]);

/// As [`strip::accumulate_strip`](crate::strip::accumulate_strip), in bf16: the same additions, bit for bit, as those of
/// [`Bf16Products`](super::bf16_codec::Bf16Products).
///
/// # Safety
/// As there, and the CPU must have AVX512_BF16.
#[inline(always)]
pub(super) unsafe fn accumulate_strip<E: Bf16Encoding>(job: &StripJob<'_>) {
    // SAFETY: the caller has the level, and the job's pointers reach every block and row of it.
    unsafe {
        let level = Avx512::assume();
        let mut strip = Strip([[0; LANES]; ColumnLayout::BLOCK_COLUMNS / 2]);
        let (mut bytes, mut x_start) = (job.panel, 0);
        let tiles = job.rows.div_ceil(TILE_ROWS);
        let block_sums = usize::from(job.grid.is_some_and(GridParameters::needs_block_sums));
        for &steps in job.steps {
            let pairs = steps as usize * E::COLUMNS / 2;
            for step in strip.0[..pairs].chunks_exact_mut(E::COLUMNS / 2) {
                unpack::<E>(level, bytes, step);
                bytes = bytes.add(E::BYTES);
            }
            let grid = job.grid.map(|grid| grid.load(level, bytes).map(Vector::to_array));
            bytes = bytes.add(job.grid.map_or(0, GridParameters::bytes));
            for tile in 0..tiles {
                let start = tile * job.rows / tiles;
                let rows = (tile + 1) * job.rows / tiles - start;
                let tile = TileJob {
                    strip: &strip.0[..pairs],
                    x: job.x.add(tile * job.tile_stride + x_start),
                    tile: job.tile.add(start * LANES),
                };
                match rows {
                    1 => tile.multiply::<1>(level, grid.as_ref()),
                    2 => tile.multiply::<2>(level, grid.as_ref()),
                    3 => tile.multiply::<3>(level, grid.as_ref()),
                    4 => tile.multiply::<4>(level, grid.as_ref()),
                    5 => tile.multiply::<5>(level, grid.as_ref()),
                    6 => tile.multiply::<6>(level, grid.as_ref()),
                    7 => tile.multiply::<7>(level, grid.as_ref()),
                    8 => tile.multiply::<8>(level, grid.as_ref()),
                    9 => tile.multiply::<9>(level, grid.as_ref()),
                    10 => tile.multiply::<10>(level, grid.as_ref()),
                    11 => tile.multiply::<11>(level, grid.as_ref()),
                    _ => tile.multiply::<TILE_ROWS>(level, grid.as_ref()),
                }
            }
            x_start += (pairs + block_sums) * TILE_ROWS;
        }
    }
}

/// Unpacks the pairs of a step.
#[inline(always)]
unsafe fn unpack<E: Bf16Encoding>(level: Avx512, step: *const u8, out: &mut [[u32; LANES]]) {
    // Written out, because shifts need a constant pair.
    written_out!(PAIR < E::COLUMNS / 2 => {
        // SAFETY: the caller's pointer is good for one step.
        unsafe { unpack_pair::<E, PAIR>(level, step, out) }
    });
}

#[inline(always)]
unsafe fn unpack_pair<E: Bf16Encoding, const PAIR: u32>(level: Avx512, step: *const u8, out: &mut [[u32; LANES]]) {
    // SAFETY: as the caller promises; a pair has room for two registers.
    unsafe {
        let U32x32(low, high) = E::words::<PAIR>(level, step);
        let out = out[PAIR as usize].as_mut_ptr();
        _mm512_storeu_si512(out.cast(), low);
        _mm512_storeu_si512(out.add(LANES / 2).cast(), high);
    }
}

/// A tile of x with a strip.
struct TileJob<'a> {
    strip: &'a [[u32; LANES]],
    /// The block of the tile.
    x: *const u32,
    /// `[rows][32]`.
    tile: *mut f32,
}

impl TileJob<'_> {
    /// # Safety
    /// The CPU must have AVX512_BF16, and the pointers must reach `ROWS` rows, in tiles of [`TILE_ROWS`].
    #[inline(always)]
    unsafe fn multiply<const ROWS: usize>(&self, level: Avx512, grid: Option<&BlockGrid<[f32; LANES]>>) {
        // SAFETY: the caller's pointers reach every column of every row; a pair of the strip is two registers.
        unsafe {
            let mut sums = [[F32x16(_mm512_setzero_ps()); 2]; ROWS];
            let mut x = self.x;
            for pair in self.strip {
                let low = as_bf16(_mm512_loadu_si512(pair.as_ptr().cast()));
                let high = as_bf16(_mm512_loadu_si512(pair.as_ptr().add(LANES / 2).cast()));
                for row in 0..ROWS {
                    let x = as_bf16(_mm512_set1_epi32(*x.add(row) as i32));
                    sums[row][0] = F32x16(_mm512_dpbf16_ps(sums[row][0].0, low, x));
                    sums[row][1] = F32x16(_mm512_dpbf16_ps(sums[row][1].0, high, x));
                }
                x = x.add(TILE_ROWS);
            }
            let block_sums = TileBlock::after(self.x, self.strip.len(), TILE_ROWS).sums();
            add_block::<Avx512, ROWS, 2>(level, &sums, grid, block_sums, 0, self.tile);
        }
    }
}
