//! Superblocks of 256 values −1, 0 and 1 with one half-precision scale.

use super::block_format::{BlockCodes, BlockGrid, BlockParts, half_at};

/// 48 bytes of five digits in base 3, 4 of four digits, scale.
pub(crate) const TQ1_0: BlockCodes =
    BlockCodes { bits: 2, group: 256, grid: BlockGrid::Zero(1), unpack: unpack_tq1_0, round: None, pack: None };
/// 64 bytes of codes of 2 bits, scale.
pub(crate) const TQ2_0: BlockCodes = BlockCodes { unpack: unpack_tq2_0, ..TQ1_0 };

/// Runs of bytes, digits in each byte: digit `d` of byte `j` of a run is its element `d · bytes + j`.
const RUNS: [(usize, u32); 3] = [(32, 5), (16, 5), (4, 4)];

fn unpack_tq1_0(block: &[u8], parts: &mut BlockParts<'_>) {
    parts.scales[0] = half_at(block, 52);
    let (mut byte, mut element) = (0, 0);
    for (bytes, digits) in RUNS {
        for digit in 0..digits {
            for inside in 0..bytes {
                // A byte is a fraction of 256 with its digits behind the point: multiplied with a power of three, its
                // next digit is what three times of it carries over.
                let shifted = block[byte + inside].wrapping_mul(3u8.pow(digit));
                parts.codes[element] = (u16::from(shifted) * 3 >> 8) as u8;
                element += 1;
            }
        }
        byte += bytes;
    }
}

fn unpack_tq2_0(block: &[u8], parts: &mut BlockParts<'_>) {
    parts.scales[0] = half_at(block, 64);
    for (element, code) in parts.codes.iter_mut().enumerate() {
        let (half, inside) = (element / 128, element % 128);
        *code = block[half * 32 + inside % 32] >> (2 * (inside / 32)) & 3;
    }
}
