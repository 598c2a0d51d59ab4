//! Blocks of 32 elements with one half-precision scale: element `j` of the first half lies in the low nibble of byte
//! `j`, element `j + 16` in the high one.

use super::block_format::{BlockCodes, BlockGrid, BlockParts, half_at, put_exact_half};
use super::rounding::{ScaleStorage, round_offset_group, round_symmetric_group};

const PLAIN: BlockCodes =
    BlockCodes { bits: 4, group: 32, grid: BlockGrid::Centered, unpack: unpack_q4_0, round: None, pack: None };

/// Scale, 16 bytes of nibbles.
pub(crate) const Q4_0: BlockCodes = BlockCodes { round: Some(round_q4_0), pack: Some(pack_q4_0), ..PLAIN };
/// Scale, minimum, 16 bytes of nibbles.
pub(crate) const Q4_1: BlockCodes = BlockCodes {
    grid: BlockGrid::Offset,
    unpack: unpack_q4_1,
    round: Some(round_q4_1),
    pack: Some(pack_q4_1),
    ..PLAIN
};
/// Scale, the fifth bits, 16 bytes of nibbles.
pub(crate) const Q5_0: BlockCodes = BlockCodes { bits: 5, unpack: unpack_q5_0, ..PLAIN };
/// Scale, minimum, the fifth bits, 16 bytes of nibbles.
pub(crate) const Q5_1: BlockCodes = BlockCodes { bits: 5, grid: BlockGrid::Offset, unpack: unpack_q5_1, ..PLAIN };
/// Scale, 32 signed bytes.
pub(crate) const Q8_0: BlockCodes =
    BlockCodes { bits: 8, unpack: unpack_q8_0, round: Some(round_q8_0), pack: Some(pack_q8_0), ..PLAIN };

/// Nibbles into codes: all low ones, then all high ones.
pub(crate) fn spread_nibbles(bytes: &[u8], codes: &mut [u8]) {
    let (low, high) = codes.split_at_mut(bytes.len());
    for ((&byte, low), high) in bytes.iter().zip(low).zip(high) {
        *low = byte & 15;
        *high = byte >> 4;
    }
}

/// The reverse of [`spread_nibbles`].
pub(crate) fn gather_nibbles(codes: &[u8], bytes: &mut [u8]) {
    let (low, high) = codes.split_at(bytes.len());
    for ((byte, low), high) in bytes.iter_mut().zip(low).zip(high) {
        *byte = low | high << 4;
    }
}

fn add_fifth_bits(bits: &[u8], codes: &mut [u8]) {
    for (element, code) in codes.iter_mut().enumerate() {
        *code |= (bits[element / 8] >> (element % 8) & 1) << 4;
    }
}

fn unpack_q4_0(block: &[u8], parts: &mut BlockParts<'_>) {
    parts.scales[0] = half_at(block, 0);
    spread_nibbles(&block[2..], parts.codes);
}

fn unpack_q4_1(block: &[u8], parts: &mut BlockParts<'_>) {
    parts.scales[0] = half_at(block, 0);
    parts.offsets[0] = half_at(block, 2);
    spread_nibbles(&block[4..], parts.codes);
}

fn unpack_q5_0(block: &[u8], parts: &mut BlockParts<'_>) {
    parts.scales[0] = half_at(block, 0);
    spread_nibbles(&block[6..], parts.codes);
    add_fifth_bits(&block[2..6], parts.codes);
}

fn unpack_q5_1(block: &[u8], parts: &mut BlockParts<'_>) {
    parts.scales[0] = half_at(block, 0);
    parts.offsets[0] = half_at(block, 2);
    spread_nibbles(&block[8..], parts.codes);
    add_fifth_bits(&block[4..8], parts.codes);
}

fn unpack_q8_0(block: &[u8], parts: &mut BlockParts<'_>) {
    parts.scales[0] = half_at(block, 0);
    for (code, &byte) in parts.codes.iter_mut().zip(&block[2..]) {
        *code = byte ^ 0x80;
    }
}

fn pack_q4_0(parts: &BlockParts<'_>, block: &mut [u8]) -> bool {
    gather_nibbles(parts.codes, &mut block[2..]);
    put_exact_half(parts.scales[0], block, 0)
}

fn pack_q4_1(parts: &BlockParts<'_>, block: &mut [u8]) -> bool {
    gather_nibbles(parts.codes, &mut block[4..]);
    put_exact_half(parts.scales[0], block, 0) && put_exact_half(parts.offsets[0], block, 2)
}

fn pack_q8_0(parts: &BlockParts<'_>, block: &mut [u8]) -> bool {
    for (byte, &code) in block[2..].iter_mut().zip(&*parts.codes) {
        *byte = code ^ 0x80;
    }
    put_exact_half(parts.scales[0], block, 0)
}

fn round_q4_0(values: &[f32], block: &mut [u8]) {
    let mut codes = [0; 32];
    let scale = round_symmetric_group(values, 4, ScaleStorage::Half, &mut codes);
    pack_q4_0(&BlockParts { codes: &mut codes, scales: &mut [scale], offsets: &mut [] }, block);
}

fn round_q4_1(values: &[f32], block: &mut [u8]) {
    let mut codes = [0; 32];
    let (scale, offset) = round_offset_group(values, 4, ScaleStorage::Half, &mut codes);
    pack_q4_1(&BlockParts { codes: &mut codes, scales: &mut [scale], offsets: &mut [offset] }, block);
}

fn round_q8_0(values: &[f32], block: &mut [u8]) {
    let mut codes = [0; 32];
    let scale = round_symmetric_group(values, 8, ScaleStorage::Half, &mut codes);
    pack_q8_0(&BlockParts { codes: &mut codes, scales: &mut [scale], offsets: &mut [] }, block);
}
