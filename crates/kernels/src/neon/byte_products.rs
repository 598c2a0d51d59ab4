use std::arch::aarch64::*;

use super::vector::Neon;
use crate::integer_level::IntegerLevel;

/// The multiplications of int8 that one level of NEON has: all that sets these levels apart.
///
/// A register holds four columns of each of four rows; `x` are the same columns of a row of x. See [`IntegerLevel`].
pub(crate) trait ByteProducts: Copy {
    type Partial: Copy;
    const RUN_LIMIT: usize;
    const SUMS_UNDER_WAY: usize;
    /// Whether bytes are multiplied as signed numbers, codes minus 128. Codes of fewer bits are below 64 and fit either
    /// way.
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

/// Two registers count as one, so that loops over the registers of a panel are as short as compilers unroll.
impl<P: ByteProducts> IntegerLevel for Neon<P> {
    type Codes = [uint8x16_t; 2];
    type Partial = [P::Partial; 2];
    type Sums = [int32x4_t; 2];
    type Floats = [float32x4_t; 2];
    const ROWS: usize = 8;
    const RUN_LIMIT: usize = P::RUN_LIMIT;
    const SUMS_UNDER_WAY: usize = P::SUMS_UNDER_WAY.div_ceil(2);
    const WRITTEN_OUT: bool = true;
    const BYTE_CENTRE: i32 = if P::SIGNED { 0 } else { 128 };

    #[inline(always)]
    unsafe fn load_codes(self, words: *const u8) -> [uint8x16_t; 2] {
        // SAFETY: the caller's pointer reaches two registers.
        unsafe { [vld1q_u8(words), vld1q_u8(words.add(16))] }
    }

    #[inline(always)]
    unsafe fn store_codes(self, codes: [uint8x16_t; 2], out: *mut u8) {
        // SAFETY: the caller's pointer has room for two registers.
        unsafe {
            vst1q_u8(out, codes[0]);
            vst1q_u8(out.add(16), codes[1]);
        }
    }

    #[inline(always)]
    fn masked_bytes(self, words: [uint8x16_t; 2], shift: u32, mask: u8) -> [uint8x16_t; 2] {
        #[inline(always)]
        unsafe fn register(words: uint8x16_t, shift: u32, mask: u8) -> uint8x16_t {
            // SAFETY: as the caller promises.
            unsafe {
                // A negative shift goes to the right; a constant one becomes a shift by that constant.
                let shifted = vshlq_u8(words, vdupq_n_s8(-(shift as i8)));
                let all = mask == u8::MAX >> shift;
                if all { shifted } else { vandq_u8(shifted, vdupq_n_u8(mask)) }
            }
        }
        // SAFETY: `Neon` exists only where the CPU has the instructions.
        unsafe { [register(words[0], shift, mask), register(words[1], shift, mask)] }
    }

    #[inline(always)]
    fn or_bytes(self, a: [uint8x16_t; 2], b: [uint8x16_t; 2]) -> [uint8x16_t; 2] {
        // SAFETY: as in `masked_bytes`.
        unsafe { [vorrq_u8(a[0], b[0]), vorrq_u8(a[1], b[1])] }
    }

    #[inline(always)]
    fn bytes(self, words: [uint8x16_t; 2]) -> [uint8x16_t; 2] {
        // SAFETY: as in `masked_bytes`.
        if P::SIGNED { unsafe { flipped(words) } } else { words }
    }

    #[inline(always)]
    fn byte_table(self, values: &[i8; 16]) -> [uint8x16_t; 2] {
        // SAFETY: as in `masked_bytes`; the array is as long as a register.
        unsafe {
            let values = [vreinterpretq_u8_s8(vld1q_s8(values.as_ptr())); 2];
            if P::SIGNED { values } else { flipped(values) }
        }
    }

    #[inline(always)]
    fn look_up(self, table: [uint8x16_t; 2], fields: [uint8x16_t; 2]) -> [uint8x16_t; 2] {
        // SAFETY: as in `masked_bytes`.
        unsafe { [vqtbl1q_u8(table[0], fields[0]), vqtbl1q_u8(table[0], fields[1])] }
    }

    #[inline(always)]
    fn splat_sum(self, value: i32) -> [int32x4_t; 2] {
        // SAFETY: as in `masked_bytes`.
        unsafe { [vdupq_n_s32(value); 2] }
    }

    #[inline(always)]
    fn add_sums(self, a: [int32x4_t; 2], b: [int32x4_t; 2]) -> [int32x4_t; 2] {
        // SAFETY: as in `masked_bytes`.
        unsafe { [vaddq_s32(a[0], b[0]), vaddq_s32(a[1], b[1])] }
    }

    #[inline(always)]
    fn open(self, sums: [int32x4_t; 2]) -> [P::Partial; 2] {
        // SAFETY: as in `masked_bytes`.
        unsafe { [P::open(sums[0]), P::open(sums[1])] }
    }

    #[inline(always)]
    fn multiply_fields(self, partial: [P::Partial; 2], codes: [uint8x16_t; 2], x: u32) -> [P::Partial; 2] {
        // SAFETY: as in `masked_bytes`.
        unsafe { [P::multiply_fields(partial[0], codes[0], x), P::multiply_fields(partial[1], codes[1], x)] }
    }

    #[inline(always)]
    fn close(self, sums: [int32x4_t; 2], partial: [P::Partial; 2]) -> [int32x4_t; 2] {
        // SAFETY: as in `masked_bytes`.
        unsafe { [P::close(sums[0], partial[0]), P::close(sums[1], partial[1])] }
    }

    #[inline(always)]
    fn multiply_bytes(self, sums: [int32x4_t; 2], bytes: [uint8x16_t; 2], x: u32) -> [int32x4_t; 2] {
        // SAFETY: as in `masked_bytes`.
        unsafe { [P::multiply_bytes(sums[0], bytes[0], x), P::multiply_bytes(sums[1], bytes[1], x)] }
    }

    #[inline(always)]
    fn floats(self, sums: [int32x4_t; 2]) -> [float32x4_t; 2] {
        // SAFETY: as in `masked_bytes`.
        unsafe { [vcvtq_f32_s32(sums[0]), vcvtq_f32_s32(sums[1])] }
    }

    #[inline(always)]
    unsafe fn subtract(self, values: [float32x4_t; 2], zero_points: *const f32, x_sum: f32) -> [float32x4_t; 2] {
        // SAFETY: as in `masked_bytes`; the caller's pointer reaches two registers.
        unsafe {
            let x_sum = vdupq_n_f32(x_sum);
            let low = vfmsq_f32(values[0], vld1q_f32(zero_points), x_sum);
            [low, vfmsq_f32(values[1], vld1q_f32(zero_points.add(4)), x_sum)]
        }
    }

    #[inline(always)]
    unsafe fn add_scaled(self, values: [float32x4_t; 2], scales: *const f32, x_scale: f32, totals: *mut f32) {
        // SAFETY: as in `masked_bytes`; the caller's pointers reach two registers each.
        unsafe {
            for i in 0..2 {
                let (scales, totals) = (vld1q_f32(scales.add(4 * i)), totals.add(4 * i));
                let scales = vmulq_f32(scales, vdupq_n_f32(x_scale));
                vst1q_f32(totals, vfmaq_f32(vld1q_f32(totals), values[i], scales));
            }
        }
    }

    #[inline(always)]
    unsafe fn add_product(self, values: *const f32, factor: f32, totals: *mut f32) {
        // SAFETY: as in `masked_bytes`; the caller's pointers reach two registers each.
        unsafe {
            for i in 0..2 {
                let (values, totals) = (vld1q_f32(values.add(4 * i)), totals.add(4 * i));
                vst1q_f32(totals, vfmaq_f32(vld1q_f32(totals), values, vdupq_n_f32(factor)));
            }
        }
    }
}

/// Bytes with their top bits flipped: minus 128 of unsigned ones, plus 128 of signed ones.
///
/// # Safety
/// The CPU must have NEON.
#[inline(always)]
unsafe fn flipped(bytes: [uint8x16_t; 2]) -> [uint8x16_t; 2] {
    // SAFETY: as the caller promises.
    unsafe { [veorq_u8(bytes[0], vdupq_n_u8(0x80)), veorq_u8(bytes[1], vdupq_n_u8(0x80))] }
}
