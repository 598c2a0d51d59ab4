//! Blocks whose codes of 4 bits stand for the values of a table.

use kintsugi_weights::CodeTable;

use super::block_format::{BlockCodes, BlockGrid, BlockParts, half_at};
use super::legacy_blocks::spread_nibbles;

const PLAIN: BlockCodes = BlockCodes {
    bits: 4,
    group: 32,
    grid: BlockGrid::Table(CodeTable::IQ4_NL),
    unpack: unpack_iq4_nl,
    round: None,
    pack: None,
};

/// Scale, 16 bytes of nibbles.
pub(crate) const IQ4_NL: BlockCodes = PLAIN;
/// Scale, high bits and low bits of the scales of eight groups, 128 bytes of nibbles.
pub(crate) const IQ4_XS: BlockCodes = BlockCodes { unpack: unpack_iq4_xs, ..PLAIN };
/// Exponent, 16 bytes of nibbles.
pub(crate) const MXFP4: BlockCodes =
    BlockCodes { grid: BlockGrid::Table(CodeTable::FP4), unpack: unpack_mxfp4, ..PLAIN };
/// Four scales of 8 bits, 32 bytes of nibbles.
pub(crate) const NVFP4: BlockCodes =
    BlockCodes { group: 16, grid: BlockGrid::Table(CodeTable::FP4), unpack: unpack_nvfp4, ..PLAIN };

fn unpack_iq4_nl(block: &[u8], parts: &mut BlockParts<'_>) {
    parts.scales[0] = half_at(block, 0);
    spread_nibbles(&block[2..], parts.codes);
}

fn unpack_iq4_xs(block: &[u8], parts: &mut BlockParts<'_>) {
    let scale = half_at(block, 0);
    let high = u16::from_le_bytes([block[2], block[3]]);
    for group in 0..8 {
        let low = block[4 + group / 2] >> (4 * (group % 2)) & 15;
        let high = (high >> (2 * group) & 3) as u8;
        parts.scales[group] = scale * (f32::from(low | high << 4) - 32.0);
        spread_nibbles(&block[8 + group * 16..24 + group * 16], &mut parts.codes[group * 32..(group + 1) * 32]);
    }
}

/// ggml counts in halves of the table's values, with half the scale: the products are the same.
fn unpack_mxfp4(block: &[u8], parts: &mut BlockParts<'_>) {
    parts.scales[0] = power_of_two(block[0]);
    spread_nibbles(&block[1..], parts.codes);
}

/// `2^(exponent − 127)`; NaN for 255, as the OCP Microscaling Formats specification has it.
fn power_of_two(exponent: u8) -> f32 {
    match exponent {
        0 => f32::from_bits(1 << 22),
        255 => f32::NAN,
        exponent => f32::from_bits(u32::from(exponent) << 23),
    }
}

fn unpack_nvfp4(block: &[u8], parts: &mut BlockParts<'_>) {
    for group in 0..4 {
        parts.scales[group] = unsigned_e4m3(block[group]);
        spread_nibbles(&block[4 + group * 8..12 + group * 8], &mut parts.codes[group * 16..(group + 1) * 16]);
    }
}

/// An 8-bit float with four bits of exponent and three of mantissa whose sign is not looked at. ggml reads the code of
/// NaN as zero.
fn unsigned_e4m3(byte: u8) -> f32 {
    let (exponent, mantissa) = (byte >> 3 & 15, f32::from(byte & 7));
    match exponent {
        _ if byte == 0x7f => 0.0,
        0 => mantissa * 2f32.powi(-9),
        _ => (1.0 + mantissa / 8.0) * 2f32.powi(i32::from(exponent) - 7),
    }
}
