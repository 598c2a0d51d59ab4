use std::arch::aarch64::*;

use super::byte_products::ByteProducts;

/// Products of int8 by instructions of ARMv8.0: signed bytes are multiplied to 16 bits (`smull`, `smlal`).
///
/// Products of codes of up to 6 bits are added up in those 16 bits, a lane per column, as long as they fit. Of bytes,
/// 2 · 128 · 127 is the largest sum of two that there can be, and it fits too.
#[derive(Clone, Copy)]
pub(crate) struct Widening;

impl ByteProducts for Widening {
    /// Rows 0 and 1, rows 2 and 3: four columns each.
    type Partial = (int16x8_t, int16x8_t);
    // A product is added to a lane at a time: 17 of codes of 4 bits would fit. 16 are twice what is unrolled.
    const RUN_LIMIT: usize = 16 * 15;
    // A panel has sixteen partial sums.
    const SUMS_UNDER_WAY: usize = 1;
    const SIGNED: bool = true;

    #[inline(always)]
    unsafe fn open(_: int32x4_t) -> (int16x8_t, int16x8_t) {
        // SAFETY: as the caller promises.
        unsafe { (vdupq_n_s16(0), vdupq_n_s16(0)) }
    }

    #[inline(always)]
    unsafe fn multiply_fields(
        (low, high): (int16x8_t, int16x8_t),
        codes: uint8x16_t,
        x: u32,
    ) -> (int16x8_t, int16x8_t) {
        // SAFETY: as the caller promises.
        unsafe {
            let (codes, x) = (vreinterpretq_s8_u8(codes), vreinterpretq_s8_u32(vdupq_n_u32(x)));
            (vmlal_s8(low, vget_low_s8(codes), vget_low_s8(x)), vmlal_high_s8(high, codes, x))
        }
    }

    #[inline(always)]
    unsafe fn close(sums: int32x4_t, (low, high): (int16x8_t, int16x8_t)) -> int32x4_t {
        // SAFETY: as the caller promises.
        unsafe { vaddq_s32(sums, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high))) }
    }

    #[inline(always)]
    unsafe fn multiply_bytes(sums: int32x4_t, bytes: uint8x16_t, x: u32) -> int32x4_t {
        // SAFETY: as the caller promises.
        unsafe {
            let (bytes, x) = (vreinterpretq_s8_u8(bytes), vreinterpretq_s8_u32(vdupq_n_u32(x)));
            let (low, high) = (vmull_s8(vget_low_s8(bytes), vget_low_s8(x)), vmull_high_s8(bytes, x));
            vpadalq_s16(sums, vpaddq_s16(low, high))
        }
    }
}
