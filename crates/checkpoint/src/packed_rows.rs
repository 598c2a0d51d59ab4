//! Matrices of codes as matrices of 32-bit words.

use kintsugi_weights::{pack_codes, packed_words, unpack_codes};

/// Packs each row of `codes` (`[rows, columns]`) densely, lowest bits first. Gives `[rows, ⌈columns·bits/32⌉]`.
pub(crate) fn pack_rows(codes: &[u8], columns: usize, bits: u8) -> Vec<u32> {
    let width = packed_words(columns, bits);
    let mut words = vec![0; codes.len() / columns * width];
    for (codes, words) in codes.chunks_exact(columns).zip(words.chunks_exact_mut(width)) {
        pack_codes(codes, bits, words);
    }
    words
}

/// The inverse of [`pack_rows`]: `words` is `[rows, ⌈columns·bits/32⌉]`, the result `[rows, columns]`.
pub(crate) fn unpack_rows(words: &[u32], columns: usize, bits: u8) -> Vec<u8> {
    let width = packed_words(columns, bits);
    let mut codes = vec![0; words.len() / width * columns];
    for (codes, words) in codes.chunks_exact_mut(columns).zip(words.chunks_exact(width)) {
        unpack_codes(words, bits, codes);
    }
    codes
}

/// `[rows, columns]` as `[columns, rows]`.
pub(crate) fn transposed<T: Copy + Default>(values: &[T], rows: usize, columns: usize) -> Vec<T> {
    // Tiles go through a copy: in rows whose length is a power of two, a column lies in one set of the cache.
    const TILE: usize = 64;
    let mut out = vec![T::default(); values.len()];
    let mut tile = [[T::default(); TILE]; TILE];
    for top in (0..rows).step_by(TILE) {
        let height = TILE.min(rows - top);
        for left in (0..columns).step_by(TILE) {
            let width = TILE.min(columns - left);
            for (line, row) in tile.iter_mut().zip(top..top + height) {
                line[..width].copy_from_slice(&values[row * columns + left..][..width]);
            }
            for column in 0..width {
                let target = &mut out[(left + column) * rows + top..][..height];
                for (value, line) in target.iter_mut().zip(&tile) {
                    *value = line[column];
                }
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transposing_twice_changes_nothing() {
        for (rows, columns) in [(1, 1), (3, 5), (64, 65), (130, 63), (1, 100)] {
            let values: Vec<u32> = (0..rows * columns).map(|i| i as u32).collect();
            let other = transposed(&values, rows, columns);
            assert_eq!(other[rows - 1], ((rows - 1) * columns) as u32);
            assert_eq!(transposed(&other, columns, rows), values);
        }
    }

    #[test]
    fn rows_are_packed_apart_from_each_other() {
        let words = pack_rows(&[1, 2, 3, 15, 0, 8], 3, 4);
        assert_eq!(words, [0x321, 0x80f]);
        assert_eq!(unpack_rows(&words, 3, 4), [1, 2, 3, 15, 0, 8]);
    }
}
