//! Superblocks of 256 elements: groups of 16 or 32 whose scales (and minimums) are small integers times one
//! half-precision number per superblock. Both products are exact in f32.

use super::block_format::{BlockCodes, BlockGrid, BlockParts, half_at, put_exact_half};
use super::rounding::{ScaleStorage, nearest_half, round_offset_group, round_symmetric_group};

/// Elements of a superblock.
const SUPERBLOCK: usize = 256;

/// 16 bytes with 4 bits of scale and 4 of minimum, 64 of codes, scale, minimum.
pub(crate) const Q2_K: BlockCodes =
    BlockCodes { bits: 2, group: 16, grid: BlockGrid::Offset, unpack: unpack_q2_k, round: None, pack: None };
/// 32 bytes of third bits, 64 of low bits, 12 of scales, scale.
pub(crate) const Q3_K: BlockCodes =
    BlockCodes { bits: 3, group: 16, grid: BlockGrid::Centered, unpack: unpack_q3_k, round: None, pack: None };
/// Scale, minimum, 12 bytes of scales and minimums, 128 of nibbles.
pub(crate) const Q4_K: BlockCodes = BlockCodes {
    bits: 4,
    group: 32,
    grid: BlockGrid::Offset,
    unpack: unpack_q4_k,
    round: Some(round_q4_k),
    pack: Some(pack_q4_k),
};
/// Scale, minimum, 12 bytes of scales and minimums, 32 of fifth bits, 128 of nibbles.
pub(crate) const Q5_K: BlockCodes =
    BlockCodes { bits: 5, group: 32, grid: BlockGrid::Offset, unpack: unpack_q5_k, round: None, pack: None };
/// 128 bytes of nibbles, 64 of high bits, 16 signed scales, scale.
pub(crate) const Q6_K: BlockCodes = BlockCodes {
    bits: 6,
    group: 16,
    grid: BlockGrid::Centered,
    unpack: unpack_q6_k,
    round: Some(round_q6_k),
    pack: Some(pack_q6_k),
};

fn unpack_q2_k(block: &[u8], parts: &mut BlockParts<'_>) {
    let (scale, minimum) = (half_at(block, 80), half_at(block, 82));
    for (group, &byte) in block[..16].iter().enumerate() {
        parts.scales[group] = scale * f32::from(byte & 15);
        parts.offsets[group] = -(minimum * f32::from(byte >> 4));
    }
    spread_pairs(&block[16..80], parts.codes);
}

fn unpack_q3_k(block: &[u8], parts: &mut BlockParts<'_>) {
    let scale = half_at(block, 108);
    let packed = &block[96..108];
    for group in 0..16 {
        let low = packed[group % 8] >> (4 * (group / 8)) & 15;
        let high = packed[8 + group % 4] >> (2 * (group / 4)) & 3;
        parts.scales[group] = scale * (f32::from(low | high << 4) - 32.0);
    }
    spread_pairs(&block[32..96], parts.codes);
    // A set bit stands for a code of the upper half: low − 4 where it is clear, low where it is set.
    for (element, code) in parts.codes.iter_mut().enumerate() {
        *code |= (block[element % 32] >> (element / 32) & 1) << 2;
    }
}

fn unpack_q4_k(block: &[u8], parts: &mut BlockParts<'_>) {
    unpack_scales_and_minimums(block, parts);
    spread_chunks(&block[16..144], parts.codes);
}

fn unpack_q5_k(block: &[u8], parts: &mut BlockParts<'_>) {
    unpack_scales_and_minimums(block, parts);
    spread_chunks(&block[48..176], parts.codes);
    for (element, code) in parts.codes.iter_mut().enumerate() {
        *code |= (block[16 + element % 32] >> (element / 32) & 1) << 4;
    }
}

fn unpack_q6_k(block: &[u8], parts: &mut BlockParts<'_>) {
    let scale = half_at(block, 208);
    for (group, &byte) in block[192..208].iter().enumerate() {
        parts.scales[group] = scale * f32::from(byte as i8);
    }
    for (element, code) in parts.codes.iter_mut().enumerate() {
        let Q6Place { low, low_shift, high, high_shift } = Q6Place::of(element);
        *code = (block[low] >> low_shift & 15) | (block[high] >> high_shift & 3) << 4;
    }
}

/// Codes of 2 bits: in each half of the superblock, byte `j` holds elements `j`, `j + 32`, `j + 64` and `j + 96`.
fn spread_pairs(bytes: &[u8], codes: &mut [u8]) {
    for (element, code) in codes.iter_mut().enumerate() {
        let (half, inside) = (element / 128, element % 128);
        *code = bytes[half * 32 + inside % 32] >> (2 * (inside / 32)) & 3;
    }
}

/// Nibbles: each 32 bytes hold 64 elements, those of the low nibbles first.
fn spread_chunks(bytes: &[u8], codes: &mut [u8]) {
    for (bytes, codes) in bytes.chunks_exact(32).zip(codes.chunks_exact_mut(64)) {
        super::legacy_blocks::spread_nibbles(bytes, codes);
    }
}

/// Eight scales and eight minimums of 6 bits in 12 bytes: the first four of each in the low bits of bytes 0–3 and 4–7,
/// the others in nibbles of bytes 8–11 with their high bits above those of the first four.
fn unpack_scales_and_minimums(block: &[u8], parts: &mut BlockParts<'_>) {
    let (scale, minimum) = (half_at(block, 0), half_at(block, 2));
    let packed = &block[4..16];
    for group in 0..8 {
        let (small_scale, small_minimum) = if group < 4 {
            (packed[group] & 63, packed[group + 4] & 63)
        } else {
            let nibbles = packed[group + 4];
            (nibbles & 15 | packed[group - 4] >> 6 << 4, nibbles >> 4 | packed[group] >> 6 << 4)
        };
        parts.scales[group] = scale * f32::from(small_scale);
        parts.offsets[group] = -(minimum * f32::from(small_minimum));
    }
}

fn pack_scales_and_minimums(scales: &[u8; 8], minimums: &[u8; 8], packed: &mut [u8]) {
    for group in 0..4 {
        packed[group] = scales[group] | scales[group + 4] >> 4 << 6;
        packed[group + 4] = minimums[group] | minimums[group + 4] >> 4 << 6;
        packed[group + 8] = scales[group + 4] & 15 | minimums[group + 4] << 4;
    }
}

/// Where a code of `Q6_K` lies in its block.
struct Q6Place {
    low: usize,
    low_shift: usize,
    high: usize,
    high_shift: usize,
}

impl Q6Place {
    fn of(element: usize) -> Self {
        let (half, inside) = (element / 128, element % 128);
        Q6Place {
            low: half * 64 + inside % 64,
            low_shift: 4 * (inside / 64),
            high: 128 + half * 32 + inside % 32,
            high_shift: 2 * (inside / 32),
        }
    }
}

fn pack_q4_k(parts: &BlockParts<'_>, block: &mut [u8]) -> bool {
    let minimums: Vec<f32> = parts.offsets.iter().map(|offset| -offset).collect();
    let (Some((scale, scales)), Some((minimum, minimums))) =
        (common_factor(parts.scales, 0, 63), common_factor(&minimums, 0, 63))
    else {
        return false;
    };
    let small = |values: &[i32]| std::array::from_fn(|group| values[group] as u8);
    pack_scales_and_minimums(&small(&scales), &small(&minimums), &mut block[4..16]);
    for (codes, bytes) in parts.codes.chunks_exact(64).zip(block[16..144].chunks_exact_mut(32)) {
        super::legacy_blocks::gather_nibbles(codes, bytes);
    }
    put_exact_half(scale, block, 0) && put_exact_half(minimum, block, 2)
}

fn pack_q6_k(parts: &BlockParts<'_>, block: &mut [u8]) -> bool {
    let Some((scale, scales)) = common_factor(parts.scales, -128, 127) else { return false };
    for (byte, &scale) in block[192..208].iter_mut().zip(&scales) {
        *byte = scale as i8 as u8;
    }
    put_q6_codes(parts.codes, block);
    put_exact_half(scale, block, 208)
}

fn put_q6_codes(codes: &[u8], block: &mut [u8]) {
    block[..192].fill(0);
    for (element, &code) in codes.iter().enumerate() {
        let Q6Place { low, low_shift, high, high_shift } = Q6Place::of(element);
        block[low] |= (code & 15) << low_shift;
        block[high] |= code >> 4 << high_shift;
    }
}

/// A half-precision number of which every value is a multiple between `least` and `most`, with the multiples; `None`
/// when there is none.
fn common_factor(values: &[f32], least: i32, most: i32) -> Option<(f32, Vec<i32>)> {
    let largest = values.iter().copied().max_by(|a, b| a.abs().total_cmp(&b.abs()))?;
    if largest == 0.0 {
        return Some((0.0, vec![0; values.len()]));
    }
    let mut candidates = (1..=most).rev().chain(least..0);
    candidates.find_map(|multiple| {
        let factor = half::f16::from_f32(largest / multiple as f32).to_f32();
        if factor == 0.0 || !factor.is_finite() {
            return None;
        }
        let multiple_of = |&value: &f32| {
            let multiple = (value / factor).round();
            let inside = multiple >= least as f32 && multiple <= most as f32;
            (inside && multiple * factor == value).then_some(multiple as i32)
        };
        Some((factor, values.iter().map(multiple_of).collect::<Option<Vec<i32>>>()?))
    })
}

/// Rounds each group by itself, then the scales and minimums to multiples of the common ones, then the codes again.
fn round_q4_k(values: &[f32], block: &mut [u8]) {
    let mut codes = [0; SUPERBLOCK];
    let mut scales = [0f32; 8];
    let mut minimums = [0f32; 8];
    for (group, values) in values.chunks_exact(32).enumerate() {
        let (scale, offset) =
            round_offset_group(values, 4, ScaleStorage::Multiple, &mut codes[group * 32..(group + 1) * 32]);
        scales[group] = scale;
        minimums[group] = -offset;
    }
    let (scale, small_scales) = small_multiples(&scales, 63);
    let (minimum, small_minimums) = small_multiples(&minimums, 63);
    for (group, values) in values.chunks_exact(32).enumerate() {
        let step = scale * f32::from(small_scales[group]);
        let offset = -(minimum * f32::from(small_minimums[group]));
        for (code, &value) in codes[group * 32..].iter_mut().zip(values) {
            *code = if step > 0.0 { ((value - offset) / step).round_ties_even().clamp(0.0, 15.0) as u8 } else { 0 };
        }
    }
    pack_scales_and_minimums(&small_scales, &small_minimums, &mut block[4..16]);
    for (codes, bytes) in codes.chunks_exact(64).zip(block[16..144].chunks_exact_mut(32)) {
        super::legacy_blocks::gather_nibbles(codes, bytes);
    }
    put_exact_half(scale, block, 0);
    put_exact_half(minimum, block, 2);
}

/// The half-precision number whose multiples up to `most` come nearest to `values`, none of them negative.
fn small_multiples(values: &[f32; 8], most: u8) -> (f32, [u8; 8]) {
    let largest = values.iter().copied().fold(0f32, f32::max);
    let factor = nearest_half(largest / f32::from(most));
    if factor == 0.0 {
        return (0.0, [0; 8]);
    }
    (factor, values.map(|value| (value / factor).round_ties_even().clamp(0.0, f32::from(most)) as u8))
}

fn round_q6_k(values: &[f32], block: &mut [u8]) {
    let mut codes = [0; SUPERBLOCK];
    let mut scales = [0f32; 16];
    for (group, values) in values.chunks_exact(16).enumerate() {
        scales[group] =
            round_symmetric_group(values, 6, ScaleStorage::Multiple, &mut codes[group * 16..(group + 1) * 16]);
    }
    let largest = scales.iter().copied().max_by(|a, b| a.abs().total_cmp(&b.abs())).unwrap_or(0.0);
    // The multiple −128 has the widest range, so the common scale has the sign that the largest lacks.
    let scale = nearest_half(largest / -128.0);
    for (group, values) in values.chunks_exact(16).enumerate() {
        let multiple = if scale == 0.0 { 0.0 } else { (scales[group] / scale).round_ties_even().clamp(-128.0, 127.0) };
        block[192 + group] = multiple as i8 as u8;
        let step = scale * multiple;
        for (code, &value) in codes[group * 16..].iter_mut().zip(values) {
            let rounded = if step == 0.0 { 0.0 } else { (value / step).round_ties_even().clamp(-32.0, 31.0) };
            *code = (rounded + 32.0) as u8;
        }
    }
    put_q6_codes(&codes, block);
    put_exact_half(scale, block, 208);
}
