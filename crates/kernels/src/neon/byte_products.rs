use std::arch::aarch64::*;

use super::vector::Neon;
use crate::integer_level::IntegerLevel;

/// The multiplications of int8 that one level of NEON has: all that sets these levels apart.
///
/// Registers hold four columns of each of four rows; `x` are the same columns of a row of x. See [`IntegerLevel`].
pub(crate) trait ByteProducts: Copy {
    type Partial: Copy;
    const RUN_LIMIT: usize;
    const SUMS_UNDER_WAY: usize;
    /// Whether bytes are multiplied as signed numbers, codes minus 128. Fields are below 16 and fit either way.
    const SIGNED: bool;

    /// # Safety
    /// The CPU must have the instructions.
    unsafe fn open(sums: int32x4_t) -> Self::Partial;
    /// # Safety
    /// The CPU must have the instructions.
    unsafe fn multiply_fields(partial: Self::Partial, codes: uint8x16_t, x: u32) -> Self::Partial;
    /// # Safety
    /// The CPU must have the instructions.
    unsafe fn close(sums: int32x4_t, partial: Self::Partial) -> int32x4_t;
    /// # Safety
    /// The CPU must have the instructions.
    unsafe fn multiply_bytes(sums: int32x4_t, bytes: uint8x16_t, x: u32) -> int32x4_t;
}

impl<P: ByteProducts> IntegerLevel for Neon<P> {
    type Codes = uint8x16_t;
    type Partial = P::Partial;
    type Sums = int32x4_t;
    type Floats = float32x4_t;
    const ROWS: usize = 4;
    const RUN_LIMIT: usize = P::RUN_LIMIT;
    const SUMS_UNDER_WAY: usize = P::SUMS_UNDER_WAY;
    const BYTE_CENTRE: i32 = if P::SIGNED { 0 } else { 128 };

    #[inline(always)]
    unsafe fn load_codes(self, words: *const u8) -> uint8x16_t {
        // SAFETY: the caller's pointer reaches a register.
        unsafe { vld1q_u8(words) }
    }

    #[inline(always)]
    unsafe fn store_codes(self, codes: uint8x16_t, out: *mut u8) {
        // SAFETY: the caller's pointer has room for a register.
        unsafe { vst1q_u8(out, codes) }
    }

    #[inline(always)]
    fn fields<const BITS: u32, const FIELD: u32>(self, words: uint8x16_t) -> uint8x16_t {
        // SAFETY: `Neon` exists only where the CPU has the instructions.
        unsafe {
            // A negative shift goes to the right; a constant one becomes a shift by that constant.
            let shifted = vshlq_u8(words, vdupq_n_s8(-((BITS * FIELD) as i8)));
            let highest = BITS * (FIELD + 1) == u8::BITS;
            if highest { shifted } else { vandq_u8(shifted, vdupq_n_u8((1 << BITS) - 1)) }
        }
    }

    #[inline(always)]
    fn bytes(self, words: uint8x16_t) -> uint8x16_t {
        // SAFETY: as in `fields`.
        if P::SIGNED { unsafe { veorq_u8(words, vdupq_n_u8(0x80)) } } else { words }
    }

    #[inline(always)]
    fn byte_table(self, values: &[i8; 16]) -> uint8x16_t {
        // SAFETY: as in `fields`; the array is as long as a register.
        unsafe {
            let values = vreinterpretq_u8_s8(vld1q_s8(values.as_ptr()));
            if P::SIGNED { values } else { veorq_u8(values, vdupq_n_u8(0x80)) }
        }
    }

    #[inline(always)]
    fn look_up(self, table: uint8x16_t, fields: uint8x16_t) -> uint8x16_t {
        // SAFETY: as in `fields`.
        unsafe { vqtbl1q_u8(table, fields) }
    }

    #[inline(always)]
    fn splat_sum(self, value: i32) -> int32x4_t {
        // SAFETY: as in `fields`.
        unsafe { vdupq_n_s32(value) }
    }

    #[inline(always)]
    fn add_sums(self, a: int32x4_t, b: int32x4_t) -> int32x4_t {
        // SAFETY: as in `fields`.
        unsafe { vaddq_s32(a, b) }
    }

    #[inline(always)]
    fn open(self, sums: int32x4_t) -> P::Partial {
        // SAFETY: as in `fields`.
        unsafe { P::open(sums) }
    }

    #[inline(always)]
    fn multiply_fields(self, partial: P::Partial, codes: uint8x16_t, x: u32) -> P::Partial {
        // SAFETY: as in `fields`.
        unsafe { P::multiply_fields(partial, codes, x) }
    }

    #[inline(always)]
    fn close(self, sums: int32x4_t, partial: P::Partial) -> int32x4_t {
        // SAFETY: as in `fields`.
        unsafe { P::close(sums, partial) }
    }

    #[inline(always)]
    fn multiply_bytes(self, sums: int32x4_t, bytes: uint8x16_t, x: u32) -> int32x4_t {
        // SAFETY: as in `fields`.
        unsafe { P::multiply_bytes(sums, bytes, x) }
    }

    #[inline(always)]
    fn floats(self, sums: int32x4_t) -> float32x4_t {
        // SAFETY: as in `fields`.
        unsafe { vcvtq_f32_s32(sums) }
    }

    #[inline(always)]
    unsafe fn subtract(self, values: float32x4_t, zero_points: *const f32, x_sum: f32) -> float32x4_t {
        // SAFETY: as in `fields`; the caller's pointer reaches a register.
        unsafe { vfmsq_f32(values, vld1q_f32(zero_points), vdupq_n_f32(x_sum)) }
    }

    #[inline(always)]
    unsafe fn add_scaled(self, values: float32x4_t, scales: *const f32, x_scale: f32, totals: *mut f32) {
        // SAFETY: as in `fields`; the caller's pointers reach a register each.
        unsafe {
            let scales = vmulq_f32(vld1q_f32(scales), vdupq_n_f32(x_scale));
            vst1q_f32(totals, vfmaq_f32(vld1q_f32(totals), values, scales));
        }
    }

    #[inline(always)]
    unsafe fn add_product(self, values: *const f32, factor: f32, totals: *mut f32) {
        // SAFETY: as in `fields`; the caller's pointers reach a register each.
        unsafe {
            let sum = vfmaq_f32(vld1q_f32(totals), vld1q_f32(values), vdupq_n_f32(factor));
            vst1q_f32(totals, sum);
        }
    }
}
