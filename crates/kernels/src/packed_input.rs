use std::cell::RefCell;

use kintsugi_runtime::ThreadPool;

use crate::kernel_table::KernelTable;
use crate::packed_matrix::{Arithmetic, ColumnLayout};

/// Rows of x as the panels of one matrix read them: in the column order of its layout, every block padded with
/// zeros, in the type of its products, and with the sum over each block.
pub(crate) struct PackedInput {
    words: Vec<u32>,
    stride: usize,
    x_words: usize,
}

thread_local! {
    /// Memory of the last input of this thread: taking it from the system anew for each product would cost as much
    /// as a small product.
    static SCRATCH: RefCell<Vec<u32>> = const { RefCell::new(Vec::new()) };
}

/// Words that a thread keeps; a longer input gives its memory back.
const SCRATCH_WORDS: usize = 4 << 20;

impl Drop for PackedInput {
    fn drop(&mut self) {
        if self.words.capacity() <= SCRATCH_WORDS {
            SCRATCH.set(std::mem::take(&mut self.words));
        }
    }
}

impl PackedInput {
    /// Packs `x`, `[count, columns]`. Block sums are needed where the matrix has zero points or offsets.
    pub(crate) fn new(
        table: &KernelTable,
        layout: &ColumnLayout,
        arithmetic: Arithmetic,
        block_sums: bool,
        x: &[f32],
        columns: usize,
        pool: &ThreadPool,
    ) -> Self {
        let padded = layout.padded_columns();
        let x_words = match arithmetic {
            Arithmetic::F32 => padded,
            Arithmetic::Bf16 => padded / 2,
        };
        let sums = if block_sums { layout.blocks.len() } else { 0 };
        // An odd number of cache lines: rows at a power of two would all fall into the same few sets of the cache.
        let stride = (x_words + sums).div_ceil(16) | 1;
        let stride = stride * 16;
        let mut words = SCRATCH.take();
        words.resize(x.len() / columns * stride, 0);
        let rows_per_task = (Self::TASK_COLUMNS / columns).max(1);
        pool.for_each_chunk(&mut words, rows_per_task * stride, |task, words| {
            let x = x[task * rows_per_task * columns..].chunks_exact(columns);
            for (words, x) in words.chunks_exact_mut(stride).zip(x) {
                let (values, rest) = words.split_at_mut(x_words);
                let sums = bytemuck::cast_slice_mut(&mut rest[..sums]);
                // SAFETY: the table is of a level that this CPU has.
                unsafe {
                    match arithmetic {
                        Arithmetic::F32 => (table.pack_f32)(layout, x, bytemuck::cast_slice_mut(values), sums),
                        Arithmetic::Bf16 => (table.pack_bf16)(layout, x, values, sums),
                    }
                }
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

    /// Words from a row to the next, of x and of block sums.
    pub(crate) fn stride(&self) -> usize {
        self.stride
    }
}

/// One row as f32. `block_sums` may be empty.
#[inline(always)]
pub(crate) fn pack_f32(layout: &ColumnLayout, x: &[f32], out: &mut [f32], block_sums: &mut [f32]) {
    let mut at = 0;
    for (index, (block, &steps)) in layout.blocks.iter().zip(&layout.steps).enumerate() {
        let padded = steps as usize * layout.step_columns;
        let (values, padding) = out[at..at + padded].split_at_mut(block.columns);
        padding.fill(0.0);
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
        let layout = ColumnLayout::grouped(5, 2, 4, group_of, true);
        let x = [1.0, 2.0, 3.0, 4.0, 5.0];
        let (mut out, mut sums) = ([7.0; 8], [7.0; 2]);
        pack_f32(&layout, &x, &mut out, &mut sums);
        assert_eq!(out, [2.0, 4.0, 5.0, 0.0, 1.0, 3.0, 0.0, 0.0]);
        assert_eq!(sums, [11.0, 4.0]);
        let (mut out, mut sums) = ([7u32; 4], [7.0; 2]);
        pack_bf16(&layout, &x, &mut out, &mut sums);
        assert_eq!(out, [0x4080_4000, 0x0000_40a0, 0x4040_3f80, 0]);
        assert_eq!(sums, [11.0, 4.0]);
    }
}
