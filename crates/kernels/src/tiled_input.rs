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
    /// Packs `x`, `[count, columns]`, in tiles of up to `tile_rows` rows for the products with a section.
    pub(crate) fn new(
        table: &KernelTable,
        section: &Section,
        arithmetic: Arithmetic,
        x: &[f32],
        columns: usize,
        tile_rows: usize,
        pool: &ThreadPool,
    ) -> Self {
        let (layout, count) = (&section.layout, x.len() / columns);
        let packer = RowPacker::new(table, section, arithmetic);
        let centre = if arithmetic == Arithmetic::Int8 { (table.integers.centre)(section.encoding) } else { 0 };
        let parameters = if arithmetic == Arithmetic::Int8 { TileBlock::INTEGER_WORDS } else { packer.block_words };
        let tile_words = (packer.x_words + layout.blocks.len() * parameters) * tile_rows;
        // An odd number of cache lines: tiles at a power of two would all fall into the same few sets of the cache.
        let stride = (tile_words.div_ceil(16) | 1) * 16;
        let tiles = count.div_ceil(tile_rows);
        let mut words = ScratchWords::new(tiles * stride);
        pool.for_each_chunk(&mut words, stride, |tile, words| {
            let first = tile * count / tiles;
            let rows = (tile + 1) * count / tiles - first;
            let row_words = packer.row_words();
            let mut packed = vec![0u32; rows * row_words];
            for (row, packed) in packed.chunks_exact_mut(row_words).enumerate() {
                packer.pack(&x[(first + row) * columns..][..columns], packed);
            }
            let (mut at, mut start) = (0, 0);
            for (block, &steps) in layout.steps.iter().enumerate() {
                let block_words = steps as usize * layout.step_columns / arithmetic.columns_per_word();
                let out = &mut words[at..at + (block_words + parameters) * tile_rows];
                for (word, out) in out[..block_words * tile_rows].chunks_exact_mut(tile_rows).enumerate() {
                    for (out, value) in out.iter_mut().zip(packed[start + word..].iter().step_by(row_words)) {
                        *out = *value;
                    }
                }
                let after = &mut out[block_words * tile_rows..];
                let known =
                    packed.chunks_exact(row_words).map(|row| &row[packer.x_words + block * packer.block_words..]);
                for (row, known) in known.enumerate() {
                    match arithmetic {
                        Arithmetic::Int8 => {
                            let sum = known[1] as i32;
                            after[row] = known[0];
                            after[tile_rows + row] = (-centre * sum) as u32;
                            after[2 * tile_rows + row] = sum as u32;
                        }
                        Arithmetic::F32 | Arithmetic::Bf16 if parameters > 0 => after[row] = known[0],
                        Arithmetic::F32 | Arithmetic::Bf16 => {}
                    }
                }
                at += out.len();
                start += block_words;
            }
        });
        TiledInput { words, stride }
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
