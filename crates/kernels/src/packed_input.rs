use bytemuck::{Pod, Zeroable};
use kintsugi_runtime::ThreadPool;

use crate::grid_parameters::GridParameters;
use crate::kernel_table::KernelTable;
use crate::packed_matrix::{Arithmetic, ColumnLayout, Section};
use crate::scratch_words::ScratchWords;

/// Rows of x as the panels of one matrix read them: in the column order of its layout, every block padded with
/// zeros, in the type of its products, and with the sum over each block (and its scale, in int8).
pub(crate) struct PackedInput {
    words: ScratchWords,
    stride: usize,
    x_words: usize,
}

/// How one row of x is rounded in one block: `x ≈ scale · i8`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
pub(crate) struct QuantizedBlock {
    /// Times the unit of the matrix.
    pub(crate) scale: f32,
    /// The sum of the i8.
    pub(crate) sum: i32,
}

// SAFETY: two words without padding, for which every bit pattern, all zeros too, is a value.
unsafe impl Zeroable for QuantizedBlock {}
// SAFETY: as above; the type is `Copy` and has no pointers.
unsafe impl Pod for QuantizedBlock {}

impl PackedInput {
    /// Packs `x`, `[count, columns]`, for the products with a section.
    pub(crate) fn new(
        table: &KernelTable,
        section: &Section,
        arithmetic: Arithmetic,
        x: &[f32],
        columns: usize,
        pool: &ThreadPool,
    ) -> Self {
        let packer = RowPacker::new(table, section, arithmetic);
        let x_words = packer.x_words;
        // An odd number of cache lines: rows at a power of two would all fall into the same few sets of the cache.
        let stride = (packer.row_words().div_ceil(16) | 1) * 16;
        let mut words = ScratchWords::new(x.len() / columns * stride);
        let rows_per_task = (Self::TASK_COLUMNS / columns).max(1);
        pool.for_each_chunk(&mut words, rows_per_task * stride, |task, words| {
            let x = x[task * rows_per_task * columns..].chunks_exact(columns);
            for (words, x) in words.chunks_exact_mut(stride).zip(x) {
                packer.pack(x, &mut words[..packer.row_words()]);
            }
        });
        PackedInput { words, stride, x_words }
    }

    /// Columns that are worth a task of their own.
    const TASK_COLUMNS: usize = 1 << 16;

    /// The words of x from row `row` on.
    pub(crate) fn row(&self, row: usize) -> *const u32 {
        self.words[row * self.stride..].as_ptr()
    }

    /// The block sums from row `row` on.
    pub(crate) fn block_sums(&self, row: usize) -> *const f32 {
        self.words[row * self.stride + self.x_words..].as_ptr().cast()
    }

    /// How each block of row `row` and of those after it is rounded, where the products are in int8.
    pub(crate) fn quantized_blocks(&self, row: usize) -> *const QuantizedBlock {
        self.words[row * self.stride + self.x_words..].as_ptr().cast()
    }

    /// Words from a row to the next, of x and of block sums.
    pub(crate) fn stride(&self) -> usize {
        self.stride
    }
}

/// Packs single rows of x for the products with a section: the columns, then what is known of each block.
pub(crate) struct RowPacker<'a> {
    table: &'a KernelTable,
    layout: &'a ColumnLayout,
    arithmetic: Arithmetic,
    unit: f32,
    /// Words of the columns.
    pub(crate) x_words: usize,
    /// Words for each block: its scale and sum in int8, elsewhere its sum where the matrix has zero points or offsets.
    pub(crate) block_words: usize,
}

impl<'a> RowPacker<'a> {
    pub(crate) fn new(table: &'a KernelTable, section: &'a Section, arithmetic: Arithmetic) -> Self {
        let layout = &section.layout;
        let block_sums = usize::from(section.grid.is_some_and(GridParameters::needs_block_sums));
        let block_words = if arithmetic == Arithmetic::Int8 { 2 } else { block_sums };
        let unit = section.integers.map_or(1.0, |integers| integers.unit);
        let x_words = layout.padded_columns() / arithmetic.columns_per_word();
        RowPacker { table, layout, arithmetic, unit, x_words, block_words }
    }

    /// Words of a row.
    pub(crate) fn row_words(&self) -> usize {
        self.x_words + self.layout.blocks.len() * self.block_words
    }

    /// Packs a row.
    pub(crate) fn pack(&self, x: &[f32], words: &mut [u32]) {
        let (values, blocks) = words.split_at_mut(self.x_words);
        let (table, layout) = (self.table, self.layout);
        // SAFETY: the table is of a level that this CPU has.
        unsafe {
            match self.arithmetic {
                Arithmetic::F32 => {
                    (table.pack_f32)(layout, x, bytemuck::cast_slice_mut(values), bytemuck::cast_slice_mut(blocks));
                }
                Arithmetic::Bf16 => (table.pack_bf16)(layout, x, values, bytemuck::cast_slice_mut(blocks)),
                Arithmetic::Int8 => {
                    let values = bytemuck::cast_slice_mut(values);
                    (table.pack_i8)(layout, self.unit, x, values, bytemuck::cast_slice_mut(blocks));
                }
            }
        }
    }
}

/// One row as f32. `block_sums` may be empty.
#[inline(always)]
pub(crate) fn pack_f32(layout: &ColumnLayout, x: &[f32], out: &mut [f32], block_sums: &mut [f32]) {
    let mut at = 0;
    for (index, (block, &steps)) in layout.blocks.iter().zip(&layout.steps).enumerate() {
        let padded = steps as usize * layout.step_columns;
        let (values, padding) = out[at..at + padded].split_at_mut(block.columns);
        if !padding.is_empty() {
            padding.fill(0.0);
        }
        match &layout.order {
            None => values.copy_from_slice(&x[block.start..block.start + block.columns]),
            Some(order) => {
                for (value, &column) in values.iter_mut().zip(&order[block.start..]) {
                    *value = x[column as usize];
                }
            }
        }
        if let Some(block_sum) = block_sums.get_mut(index) {
            *block_sum = sum(values);
        }
        at += padded;
    }
}

/// One row rounded to bf16. `block_sums` may be empty.
#[inline(always)]
pub(crate) fn pack_bf16(layout: &ColumnLayout, x: &[f32], out: &mut [u32], block_sums: &mut [f32]) {
    let mut rounded = [0.0f32; ColumnLayout::BLOCK_COLUMNS];
    let mut at = 0;
    for (index, (block, &steps)) in layout.blocks.iter().zip(&layout.steps).enumerate() {
        let padded = steps as usize * layout.step_columns;
        let values = &mut rounded[..padded];
        values[block.columns..].fill(0.0);
        match &layout.order {
            None => {
                for (value, &x) in values.iter_mut().zip(&x[block.start..block.start + block.columns]) {
                    *value = round_to_bf16(x);
                }
            }
            Some(order) => {
                for (value, &column) in values.iter_mut().zip(&order[block.start..block.start + block.columns]) {
                    *value = round_to_bf16(x[column as usize]);
                }
            }
        }
        for (word, pair) in out[at..at + padded / 2].iter_mut().zip(values.as_chunks::<2>().0) {
            *word = pair[0].to_bits() >> 16 | pair[1].to_bits();
        }
        if let Some(block_sum) = block_sums.get_mut(index) {
            *block_sum = sum(values);
        }
        at += padded / 2;
    }
}

/// One row in int8, with the scale and the sum of each block.
#[inline(always)]
pub(crate) fn pack_i8(layout: &ColumnLayout, unit: f32, x: &[f32], out: &mut [i8], blocks: &mut [QuantizedBlock]) {
    let mut gathered = [0.0; ColumnLayout::INTEGER_BLOCK_COLUMNS];
    let mut at = 0;
    for ((block, &steps), quantized) in layout.blocks.iter().zip(&layout.steps).zip(blocks) {
        let padded = steps as usize * layout.step_columns;
        let (values, padding) = out[at..at + padded].split_at_mut(block.columns);
        // Not a call for nothing in each block.
        if !padding.is_empty() {
            padding.fill(0);
        }
        let columns = block.start..block.start + block.columns;
        let x = match &layout.order {
            None => &x[columns],
            Some(order) => {
                for (value, &column) in gathered.iter_mut().zip(&order[columns]) {
                    *value = x[column as usize];
                }
                &gathered[..block.columns]
            }
        };
        *quantized = quantize(x, values);
        quantized.scale *= unit;
        at += padded;
    }
}

/// Rounds a block to multiples of a 127th of its largest size, to nearest.
///
/// Steps are no smaller than the smallest normal number, so that their reciprocal is finite. A block with a value
/// that is not finite becomes zeros with that scale: its products are NaN.
#[inline(always)]
fn quantize(x: &[f32], out: &mut [i8]) -> QuantizedBlock {
    // Adding it rounds to an integer, which then stands in the lowest bits.
    const ROUND: f32 = 12_582_912.0;

    // As integers the sizes have the same order, with infinities and then NaN at the end.
    let largest = x.iter().fold(0, |largest, x| x.abs().to_bits().max(largest));
    let largest = f32::from_bits(largest);
    if !largest.is_finite() {
        out.fill(0);
        return QuantizedBlock { scale: largest, sum: 0 };
    }
    let scale = (largest / 127.0).max(f32::MIN_POSITIVE);
    let reciprocal = 1.0 / scale;
    let mut sum = 0;
    for (out, x) in out.iter_mut().zip(x) {
        let rounded = (x * reciprocal + ROUND).to_bits() as i32 - ROUND.to_bits() as i32;
        *out = rounded as i8;
        sum += rounded;
    }
    QuantizedBlock { scale, sum }
}

/// To nearest, ties to even; NaN stays NaN.
#[inline(always)]
fn round_to_bf16(value: f32) -> f32 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    let rounded = if value.is_nan() { bits | 0x0040_0000 } else { rounded };
    f32::from_bits(rounded & 0xffff_0000)
}

/// The sum in an order that depends on the length alone.
#[inline(always)]
fn sum(values: &[f32]) -> f32 {
    let (chunks, rest) = values.as_chunks::<16>();
    let mut lanes = [0.0f32; 16];
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane += value;
        }
    }
    for (lane, value) in lanes.iter_mut().zip(rest) {
        *lane += value;
    }
    let mut width = 16;
    while width > 1 {
        width /= 2;
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_that_of_bf16() {
        let hostile = [0.0, -0.0, 1.0, 1.003_906_3, 1.011_718_8, 3.0e38, f32::MAX, f32::INFINITY, 1e-40, -1e-45];
        let spread = (0..100_000u32).map(|i| f32::from_bits(i.wrapping_mul(42_941)));
        for value in spread.chain(hostile) {
            let expected = half::bf16::from_f32(value).to_f32();
            assert_eq!(round_to_bf16(value).to_bits(), expected.to_bits(), "{value:e}");
        }
        assert!(round_to_bf16(f32::NAN).is_nan());
        assert!(round_to_bf16(f32::from_bits(0x7f80_0001)).is_nan());
    }

    #[test]
    fn rows_are_permuted_and_padded() {
        let group_of = |column: usize| [1, 0, 1, 0, 0][column];
        let layout = ColumnLayout::grouped(5, 2, 4, 512, group_of, true);
        let x = [1.0, 2.0, 3.0, 4.0, 5.0];
        let (mut out, mut sums) = ([7.0; 8], [7.0; 2]);
        pack_f32(&layout, &x, &mut out, &mut sums);
        assert_eq!(out, [2.0, 4.0, 5.0, 0.0, 1.0, 3.0, 0.0, 0.0]);
        assert_eq!(sums, [11.0, 4.0]);
        let (mut out, mut blocks) = ([7i8; 8], [QuantizedBlock::default(); 2]);
        pack_i8(&layout, 0.5, &x, &mut out, &mut blocks);
        assert_eq!(out, [51, 102, 127, 0, 42, 127, 0, 0]);
        assert_eq!(blocks.map(|block| block.sum), [280, 169]);
        assert_eq!(blocks.map(|block| block.scale), [5.0 / 127.0 / 2.0, 3.0 / 127.0 / 2.0]);
        let (mut out, mut sums) = ([7u32; 4], [7.0; 2]);
        pack_bf16(&layout, &x, &mut out, &mut sums);
        assert_eq!(out, [0x4080_4000, 0x0000_40a0, 0x4040_3f80, 0]);
        assert_eq!(sums, [11.0, 4.0]);
    }

    #[test]
    fn blocks_are_rounded_to_a_127th_of_their_largest_value() {
        let quantized = |x: &[f32]| {
            let mut out = vec![7; x.len()];
            let block = quantize(x, &mut out);
            (out, block.scale, block.sum)
        };
        assert_eq!(quantized(&[0.0, -0.0]), (vec![0, 0], f32::MIN_POSITIVE, 0));
        assert_eq!(quantized(&[-254.0, 1.0, 3.0, 2.9]), (vec![-127, 0, 2, 1], 2.0, -124));
        assert_eq!(quantized(&[f32::MAX, f32::MIN]).0, [127, -127]);
        // Subnormal values are multiples of the smallest normal number.
        assert_eq!(quantized(&[1e-39, f32::MIN_POSITIVE]), (vec![0, 1], f32::MIN_POSITIVE, 1));
        for value in [f32::INFINITY, f32::NEG_INFINITY] {
            assert_eq!(quantized(&[1.0, value]), (vec![0, 0], f32::INFINITY, 0));
        }
        let (out, scale, sum) = quantized(&[f32::INFINITY, f32::NAN, 1.0]);
        assert!(out == [0, 0, 0] && scale.is_nan() && sum == 0);
    }
}
