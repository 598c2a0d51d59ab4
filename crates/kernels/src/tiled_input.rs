use kintsugi_runtime::ThreadPool;

use crate::kernel_table::KernelTable;
use crate::packed_input::RowPacker;
use crate::packed_matrix::{Arithmetic, Section};
use crate::scratch_words::ScratchWords;

/// Rows of x as the strips of one matrix read them: tile by tile, and within a tile block by block.
///
/// In a block the rows of the tile lie side by side, word after word of their columns, and what is known of each row
/// ([`TileBlock`]) after the last of them. So a product reads one sequence of words per tile, with one pointer.
pub(crate) struct TiledInput {
    words: ScratchWords,
    stride: usize,
}

/// What is known of the rows of a tile in a block. In int8: the scale of each row; what its sums start with, which is
/// minus the centre of the codes times the sum of x; and the sum of x. Elsewhere its sum, where the matrix has zero points
/// or offsets.
#[derive(Clone, Copy)]
pub(crate) struct TileBlock {
    /// `[parameters][rows of a tile]`
    words: *const u32,
    tile_rows: usize,
}

impl TileBlock {
    /// Words of a row in int8.
    pub(crate) const INTEGER_WORDS: usize = 3;

    /// # Safety
    /// `x` must point to a block of so many words per row, in a tile of so many rows.
    #[inline(always)]
    pub(crate) unsafe fn after(x: *const u32, words: usize, tile_rows: usize) -> Self {
        // SAFETY: as the caller promises.
        TileBlock { words: unsafe { x.add(words * tile_rows) }, tile_rows }
    }

    #[inline(always)]
    pub(crate) fn scales(self) -> *const f32 {
        self.words.cast()
    }

    #[inline(always)]
    pub(crate) fn starts(self) -> *const i32 {
        self.words.wrapping_add(self.tile_rows).cast()
    }

    #[inline(always)]
    pub(crate) fn integer_sums(self) -> *const i32 {
        self.words.wrapping_add(2 * self.tile_rows).cast()
    }

    #[inline(always)]
    pub(crate) fn sums(self) -> *const f32 {
        self.words.cast()
    }
}

impl TiledInput {
    /// Packs `x`, `[count, columns]`, in tiles for the products with a section.
    pub(crate) fn new(
        table: &KernelTable,
        section: &Section,
        arithmetic: Arithmetic,
        x: &[f32],
        columns: usize,
        pool: &ThreadPool,
    ) -> Self {
        let (layout, count) = (&section.layout, x.len() / columns);
        let tile_rows = match arithmetic {
            Arithmetic::Int8 => table.integers.tile_rows,
            Arithmetic::F32 | Arithmetic::Bf16 => table.strip.tile_rows,
        };
        let packer = RowPacker::new(table, section, arithmetic);
        let centre = if arithmetic == Arithmetic::Int8 { (table.integers.centre)(section.encoding) } else { 0 };
        let parameters = if arithmetic == Arithmetic::Int8 { TileBlock::INTEGER_WORDS } else { packer.block_words };
        let tile_words = (packer.x_words + layout.blocks.len() * parameters) * tile_rows;
        // An odd number of cache lines: tiles at a power of two would all fall into the same few sets of the cache.
        let stride = (tile_words.div_ceil(16) | 1) * 16;
        let tiles = count.div_ceil(tile_rows);
        let mut words = ScratchWords::new(tiles * stride);
        pool.for_each_chunk(&mut words, stride, |tile, words| {
            let (start, end) = (tile * count / tiles, (tile + 1) * count / tiles);
            let row_words = packer.row_words();
            let mut packed = ScratchWords::new(ROWS_TOGETHER * row_words);
            for first in (0..end - start).step_by(ROWS_TOGETHER) {
                let rows = ROWS_TOGETHER.min(end - start - first);
                let x = x[(start + first) * columns..].chunks_exact(columns);
                for (x, packed) in x.zip(packed.chunks_exact_mut(row_words)).take(rows) {
                    packer.pack(x, packed);
                }
                let (mut out, mut from) = (&mut words[..], 0);
                for (block, &steps) in layout.steps.iter().enumerate() {
                    let block_words = steps as usize * layout.step_columns / arithmetic.columns_per_word();
                    let (values, rest) = out.split_at_mut(block_words * tile_rows);
                    let packed = || packed.chunks_exact(row_words).take(rows);
                    interleave(packed().map(|row| &row[from..from + block_words]), first, values, tile_rows);
                    let (known, rest) = rest.split_at_mut(parameters * tile_rows);
                    let of_block = packer.x_words + block * packer.block_words;
                    for (row, packed) in (first..).zip(packed()) {
                        let packed = &packed[of_block..of_block + packer.block_words];
                        match packed {
                            [scale, sum] => {
                                known[row] = *scale;
                                known[tile_rows + row] = (-centre * *sum as i32) as u32;
                                known[2 * tile_rows + row] = *sum;
                            }
                            [sum] => known[row] = *sum,
                            _ => {}
                        }
                    }
                    out = rest;
                    from += block_words;
                }
            }
        });
        TiledInput { words, stride }
    }

    /// The same rows in int8 for a section that reads them alike, but whose codes have a centre that is so much larger.
    pub(crate) fn recentred(&self, table: &KernelTable, section: &Section, moved: i32, pool: &ThreadPool) -> Self {
        let tile_rows = table.integers.tile_rows;
        let mut words = ScratchWords::new(self.words.len());
        pool.for_each_chunk(&mut words, self.stride, |tile, words| {
            words.copy_from_slice(&self.words[tile * self.stride..][..self.stride]);
            let mut rest = words;
            for &steps in &section.layout.steps {
                let columns = steps as usize * section.layout.step_columns;
                let known = &mut rest[columns / Arithmetic::Int8.columns_per_word() * tile_rows..];
                let (known, after) = known.split_at_mut(TileBlock::INTEGER_WORDS * tile_rows);
                let (starts, sums) = known[tile_rows..].split_at_mut(tile_rows);
                for (start, &mut sum) in starts.iter_mut().zip(sums) {
                    // Rows that a tile lacks hold anything.
                    *start = start.wrapping_sub((moved as u32).wrapping_mul(sum));
                }
                rest = after;
            }
        });
        TiledInput { words, stride: self.stride }
    }

    /// The first word.
    pub(crate) fn words(&self) -> *const u32 {
        self.words.as_ptr()
    }

    /// Words from a tile to the next.
    pub(crate) fn stride(&self) -> usize {
        self.stride
    }
}

/// Rows that are written side by side at once.
const ROWS_TOGETHER: usize = 4;

/// Writes some rows side by side, from the row `first` of a tile on.
fn interleave<'a>(mut rows: impl ExactSizeIterator<Item = &'a [u32]>, first: usize, out: &mut [u32], tile_rows: usize) {
    let out = out.chunks_exact_mut(tile_rows).map(|out| &mut out[first..]);
    if rows.len() == ROWS_TOGETHER
        && let (Some(a), Some(b), Some(c), Some(d)) = (rows.next(), rows.next(), rows.next(), rows.next())
    {
        for ((((out, a), b), c), d) in out.zip(a).zip(b).zip(c).zip(d) {
            out[..ROWS_TOGETHER].copy_from_slice(&[*a, *b, *c, *d]);
        }
        return;
    }
    let rows: Vec<&[u32]> = rows.collect();
    for (word, out) in out.enumerate() {
        for (out, row) in out.iter_mut().zip(&rows) {
            *out = row[word];
        }
    }
}
