use kintsugi_runtime::ThreadPool;

use crate::kernel_table::KernelTable;
use crate::packed_input::QuantizedBlock;
use crate::packed_matrix::Section;
use crate::scratch_words::ScratchWords;

/// Rows of x in int8 as the strips of one matrix read them: tile by tile, and within a tile block by block.
///
/// In a block the rows of the tile lie side by side, four columns after four columns, and what is known of each row
/// after the last of them ([`TileBlock`]). So a product reads one sequence of words per tile, with one pointer.
pub(crate) struct TiledInput {
    words: ScratchWords,
    stride: usize,
}

/// Where the parts of a block of a tile are.
#[derive(Clone, Copy)]
pub(crate) struct TileBlock {
    /// The scale of each row.
    pub(crate) scales: *const f32,
    /// What the sums of each row start with: minus the centre of the codes times the sum of x.
    pub(crate) starts: *const i32,
    /// The sum of each row.
    pub(crate) sums: *const i32,
}

impl TileBlock {
    /// Words that follow the columns of a row.
    const PARAMETERS: usize = 3;

    /// Words of a block of so many groups of four columns in a tile of so many rows.
    #[inline(always)]
    pub(crate) fn words(quads: usize, tile_rows: usize) -> usize {
        (quads + Self::PARAMETERS) * tile_rows
    }

    /// # Safety
    /// `x` must point to a block of that size.
    #[inline(always)]
    pub(crate) unsafe fn new(x: *const u32, quads: usize, tile_rows: usize) -> Self {
        // SAFETY: as the caller promises.
        unsafe {
            let scales = x.add(quads * tile_rows);
            let (starts, sums) = (scales.add(tile_rows), scales.add(2 * tile_rows));
            TileBlock { scales: scales.cast(), starts: starts.cast(), sums: sums.cast() }
        }
    }
}

impl TiledInput {
    /// Packs `x`, `[count, columns]`, for the products with a section in int8.
    pub(crate) fn new(table: &KernelTable, section: &Section, x: &[f32], columns: usize, pool: &ThreadPool) -> Self {
        let (layout, count, most) = (&section.layout, x.len() / columns, table.integers.tile_rows);
        let unit = section.integers.map_or(1.0, |integers| integers.unit);
        let centre = (table.integers.centre)(section.encoding);
        let row_words = layout.padded_columns() / 4;
        let words = row_words * most + layout.blocks.len() * TileBlock::words(0, most);
        // An odd number of cache lines: tiles at a power of two would all fall into the same few sets of the cache.
        let stride = (words.div_ceil(16) | 1) * 16;
        let tiles = count.div_ceil(most);
        let mut words = ScratchWords::new(tiles * stride);
        pool.for_each_chunk(&mut words, stride, |tile, words| {
            let rows = tile * count / tiles..(tile + 1) * count / tiles;
            let mut values = vec![0u32; rows.len() * row_words];
            let mut blocks = vec![QuantizedBlock::default(); rows.len() * layout.blocks.len()];
            let x = x[rows.start * columns..rows.end * columns].chunks_exact(columns);
            let outputs = values.chunks_exact_mut(row_words).zip(blocks.chunks_exact_mut(layout.blocks.len()));
            for (x, (values, blocks)) in x.zip(outputs) {
                // SAFETY: the table is of a level that this CPU has.
                unsafe { (table.pack_i8)(layout, unit, x, bytemuck::cast_slice_mut(values), blocks) };
            }
            let (mut at, mut first) = (0, 0);
            for (block, &steps) in layout.steps.iter().enumerate() {
                let quads = steps as usize * layout.step_columns / 4;
                let out = &mut words[at..at + TileBlock::words(quads, most)];
                let (columns, parameters) = out.split_at_mut(quads * most);
                for (quad, out) in columns.chunks_exact_mut(most).enumerate() {
                    for (out, values) in out.iter_mut().zip(values[first + quad..].iter().step_by(row_words)) {
                        *out = *values;
                    }
                }
                for (row, block) in blocks[block..].iter().step_by(layout.blocks.len()).enumerate() {
                    parameters[row] = block.scale.to_bits();
                    parameters[most + row] = (-centre * block.sum) as u32;
                    parameters[2 * most + row] = block.sum as u32;
                }
                at += out.len();
                first += quads;
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
