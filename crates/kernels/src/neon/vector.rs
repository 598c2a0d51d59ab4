use std::arch::aarch64::*;
use std::marker::PhantomData;

use super::integer::Widening;
use crate::strip::HALF;
use crate::vector::{Half, LANES, Level, Vector};

/// 32 lanes in eight registers.
#[derive(Clone, Copy)]
pub(crate) struct F32x32([float32x4_t; 8]);

/// 16 lanes in four registers.
#[derive(Clone, Copy)]
pub(crate) struct F32x16([float32x4_t; 4]);

/// 32 words in eight registers.
#[derive(Clone, Copy)]
pub(crate) struct U32x32([uint32x4_t; 8]);

/// NEON, and `P` for products of int8. A value exists only where the CPU has them.
#[derive(Clone, Copy)]
pub(crate) struct Neon<P = Widening>(PhantomData<P>);

/// A value whose registers are those of an expression over the index of the register. Written out, because arrays whose
/// indices are constants stay in registers.
macro_rules! registers {
    (F32x16, |$i:ident| $value:expr) => {
        registers!(@ F32x16 [0 1 2 3] $i $value)
    };
    ($kind:ident, |$i:ident| $value:expr) => {
        registers!(@ $kind [0 1 2 3 4 5 6 7] $i $value)
    };
    (@ $kind:ident [$($index:literal)+] $i:ident $value:expr) => {
        // SAFETY: `Neon`, and values that come from it, exist only where the CPU has the instructions; the caller's
        // arrays hold as many lanes as the value.
        unsafe {
            $kind([$({
                let $i: usize = $index;
                $value
            }),+])
        }
    };
}

impl Vector for F32x32 {
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        registers!(F32x32, |i| vaddq_f32(self.0[i], other.0[i]))
    }

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        registers!(F32x32, |i| vsubq_f32(self.0[i], other.0[i]))
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        registers!(F32x32, |i| vmulq_f32(self.0[i], other.0[i]))
    }

    #[inline(always)]
    fn div(self, other: Self) -> Self {
        registers!(F32x32, |i| vdivq_f32(self.0[i], other.0[i]))
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        registers!(F32x32, |i| vfmaq_f32(addend.0[i], self.0[i], factor.0[i]))
    }

    // Not `vmaxq_f32` and `vminq_f32`, which return NaN where either is NaN.
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        registers!(F32x32, |i| vbslq_f32(vcgtq_f32(self.0[i], other.0[i]), self.0[i], other.0[i]))
    }

    #[inline(always)]
    fn min(self, other: Self) -> Self {
        registers!(F32x32, |i| vbslq_f32(vcltq_f32(self.0[i], other.0[i]), self.0[i], other.0[i]))
    }

    #[inline(always)]
    fn power_of_two(self) -> Self {
        registers!(F32x32, |i| {
            let exponent = vshlq_n_u32::<23>(vreinterpretq_u32_f32(self.0[i]));
            vreinterpretq_f32_u32(vaddq_u32(exponent, vdupq_n_u32(0x3f80_0000)))
        })
    }

    #[inline(always)]
    fn store(self, out: &mut [f32; LANES]) {
        let out = out.as_mut_ptr();
        for i in 0..8 {
            // SAFETY: `out` has room for eight registers of four lanes, and the CPU has NEON as the value shows.
            unsafe { vst1q_f32(out.add(4 * i), self.0[i]) }
        }
    }
}

impl Half for F32x16 {
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        registers!(F32x16, |i| vaddq_f32(self.0[i], other.0[i]))
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        registers!(F32x16, |i| vfmaq_f32(addend.0[i], self.0[i], factor.0[i]))
    }

    #[inline(always)]
    fn store(self, out: &mut [f32]) {
        let out = out[..HALF].as_mut_ptr();
        for i in 0..4 {
            // SAFETY: `out` has room for four registers of four lanes, and the CPU has NEON as the value shows.
            unsafe { vst1q_f32(out.add(4 * i), self.0[i]) }
        }
    }
}

impl<P: Copy> Level for Neon<P> {
    type Vector = F32x32;
    type Half = F32x16;
    type Words = U32x32;
    /// The bytes of sixteen f32.
    type Table = uint8x16x4_t;

    #[inline(always)]
    unsafe fn assume() -> Self {
        Neon(PhantomData)
    }

    #[inline(always)]
    fn splat(self, value: f32) -> F32x32 {
        registers!(F32x32, |_i| vdupq_n_f32(value))
    }

    #[inline(always)]
    fn splat_half(self, value: f32) -> F32x16 {
        registers!(F32x16, |_i| vdupq_n_f32(value))
    }

    #[inline(always)]
    fn half(self, values: &[f32]) -> F32x16 {
        let values = &values[..HALF];
        registers!(F32x16, |i| vld1q_f32(values.as_ptr().add(4 * i)))
    }

    #[inline(always)]
    fn load(self, values: &[f32; LANES]) -> F32x32 {
        registers!(F32x32, |i| vld1q_f32(values.as_ptr().add(4 * i)))
    }

    #[inline(always)]
    fn load_words(self, bytes: &[u8; 4 * LANES]) -> U32x32 {
        registers!(U32x32, |i| vreinterpretq_u32_u8(vld1q_u8(bytes.as_ptr().add(16 * i))))
    }

    #[inline(always)]
    fn load_f16(self, bytes: &[u8; 2 * LANES]) -> F32x32 {
        registers!(F32x32, |i| vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(bytes.as_ptr().add(8 * i)))))
    }

    #[inline(always)]
    fn load_bf16(self, bytes: &[u8; 2 * LANES]) -> F32x32 {
        registers!(F32x32, |i| {
            let halves = vreinterpret_u16_u8(vld1_u8(bytes.as_ptr().add(8 * i)));
            vreinterpretq_f32_u32(vshll_n_u16::<16>(halves))
        })
    }

    #[inline(always)]
    fn load_i8(self, bytes: &[u8; LANES]) -> F32x32 {
        registers!(F32x32, |i| {
            let eight = vmovl_s8(vreinterpret_s8_u8(vld1_u8(bytes.as_ptr().add(i / 2 * 8))));
            let four = if i.is_multiple_of(2) { vget_low_s16(eight) } else { vget_high_s16(eight) };
            vcvtq_f32_s32(vmovl_s16(four))
        })
    }

    #[inline(always)]
    fn f32s(self, words: U32x32) -> F32x32 {
        registers!(F32x32, |i| vreinterpretq_f32_u32(words.0[i]))
    }

    #[inline(always)]
    fn bf16_pair(self, words: U32x32) -> (F32x32, F32x32) {
        (
            registers!(F32x32, |i| vreinterpretq_f32_u32(vshlq_n_u32::<16>(words.0[i]))),
            registers!(F32x32, |i| vreinterpretq_f32_u32(vandq_u32(words.0[i], vdupq_n_u32(0xffff_0000)))),
        )
    }

    #[inline(always)]
    fn masked(self, words: U32x32, shift: u32, mask: u32) -> U32x32 {
        registers!(U32x32, |i| {
            // A negative shift goes to the right; a constant one becomes a shift by that constant.
            let shifted = vshlq_u32(words.0[i], vdupq_n_s32(-(shift as i32)));
            vandq_u32(shifted, vdupq_n_u32(mask * 0x0001_0001))
        })
    }

    #[inline(always)]
    fn or(self, a: U32x32, b: U32x32) -> U32x32 {
        registers!(U32x32, |i| vorrq_u32(a.0[i], b.0[i]))
    }

    #[inline(always)]
    fn field_pair<const BITS: u32>(self, words: U32x32, position: u32) -> (F32x32, F32x32) {
        (signed_field::<BITS>(words, position), signed_field::<BITS>(words, 16 + position))
    }

    #[inline(always)]
    fn table(self, values: &[f32; 16]) -> uint8x16x4_t {
        // SAFETY: `Neon` exists only where the CPU has the instructions; the values are 64 bytes.
        unsafe {
            let register = |i: usize| vreinterpretq_u8_f32(vld1q_f32(values.as_ptr().add(4 * i)));
            uint8x16x4_t(register(0), register(1), register(2), register(3))
        }
    }

    #[inline(always)]
    fn table4_pair<const PAIR: u32>(self, table: uint8x16x4_t, words: U32x32) -> (F32x32, F32x32) {
        (from_table(table, words, 4 * PAIR), from_table(table, words, 16 + 4 * PAIR))
    }
}

/// What the field of 4 bits at `position` stands for: the instruction looks up single bytes, of which those from
/// `4 · code` on are a value.
#[inline(always)]
fn from_table(table: uint8x16x4_t, words: U32x32, position: u32) -> F32x32 {
    registers!(F32x32, |i| {
        let codes = vandq_u32(vshlq_u32(words.0[i], vdupq_n_s32(-(position as i32))), vdupq_n_u32(15));
        let bytes = vmlaq_u32(vdupq_n_u32(0x0302_0100), codes, vdupq_n_u32(0x0404_0404));
        vreinterpretq_f32_u8(vqtbl4q_u8(table, vreinterpretq_u8_u32(bytes)))
    })
}

/// The signed number of `BITS` bits at `position`.
#[inline(always)]
fn signed_field<const BITS: u32>(words: U32x32, position: u32) -> F32x32 {
    let up = 32u32.wrapping_sub(BITS).wrapping_sub(position) as i32;
    registers!(F32x32, |i| {
        // A negative shift goes to the right. Both are constants, and so become shifts by one.
        let high = vshlq_s32(vreinterpretq_s32_u32(words.0[i]), vdupq_n_s32(up));
        vcvtq_f32_s32(vshlq_s32(high, vdupq_n_s32(BITS as i32 - 32)))
    })
}
