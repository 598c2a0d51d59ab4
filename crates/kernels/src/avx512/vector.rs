use std::arch::x86_64::*;

use crate::prefetch::{Cache, Prefetch};
use crate::strip::HALF;
use crate::vector::{Half, LANES, Level, Vector};

/// 32 lanes in two registers.
#[derive(Clone, Copy)]
pub(crate) struct F32x32(pub(super) __m512, pub(super) __m512);

/// 16 lanes in a register.
#[derive(Clone, Copy)]
pub(crate) struct F32x16(pub(super) __m512);

/// 32 words in two registers.
#[derive(Clone, Copy)]
pub(crate) struct U32x32(pub(super) __m512i, pub(super) __m512i);

/// AVX-512 F, BW, VL, DQ and VNNI. A value exists only where the CPU has them.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(());

/// An intrinsic on both registers of its arguments.
macro_rules! lanewise {
    ($intrinsic:ident($($argument:expr),*)) => {
        // SAFETY: values of these types exist only where `Avx512::assume` was sound.
        unsafe { F32x32($intrinsic($($argument.0),*), $intrinsic($($argument.1),*)) }
    };
}

/// A vector whose two registers are the values of an expression over the index of the register.
macro_rules! registers {
    ($kind:ident, |$i:ident| $value:expr) => {
        // SAFETY: `Avx512` exists only where the CPU has the instructions, and the caller's arrays hold 32 elements.
        unsafe {
            $kind(
                {
                    let $i = 0usize;
                    $value
                },
                {
                    let $i = 1usize;
                    $value
                },
            )
        }
    };
}

impl Vector for F32x32 {
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        lanewise!(_mm512_add_ps(self, other))
    }

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        lanewise!(_mm512_sub_ps(self, other))
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        lanewise!(_mm512_mul_ps(self, other))
    }

    #[inline(always)]
    fn div(self, other: Self) -> Self {
        lanewise!(_mm512_div_ps(self, other))
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        lanewise!(_mm512_fmadd_ps(self, factor, addend))
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        lanewise!(_mm512_max_ps(self, other))
    }

    #[inline(always)]
    fn min(self, other: Self) -> Self {
        lanewise!(_mm512_min_ps(self, other))
    }

    #[inline(always)]
    fn power_of_two(self) -> Self {
        #[inline(always)]
        unsafe fn register(lanes: __m512) -> __m512 {
            // SAFETY: the caller has AVX-512.
            unsafe {
                let exponent = _mm512_slli_epi32::<23>(_mm512_castps_si512(lanes));
                _mm512_castsi512_ps(_mm512_add_epi32(exponent, _mm512_set1_epi32(0x3f80_0000)))
            }
        }
        lanewise!(register(self))
    }

    #[inline(always)]
    fn store(self, out: &mut [f32; LANES]) {
        let out = out.as_mut_ptr();
        // SAFETY: `out` has room for two registers of sixteen lanes.
        unsafe {
            _mm512_storeu_ps(out, self.0);
            _mm512_storeu_ps(out.add(16), self.1);
        }
    }
}

impl Half for F32x16 {
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        // SAFETY: values of this type exist only where `Avx512::assume` was sound.
        unsafe { F32x16(_mm512_add_ps(self.0, other.0)) }
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        // SAFETY: values of this type exist only where `Avx512::assume` was sound.
        unsafe { F32x16(_mm512_fmadd_ps(self.0, factor.0, addend.0)) }
    }

    #[inline(always)]
    fn store(self, out: &mut [f32]) {
        // SAFETY: the slice has room for a register of sixteen lanes.
        unsafe { _mm512_storeu_ps(out[..HALF].as_mut_ptr(), self.0) }
    }
}

impl Level for Avx512 {
    type Vector = F32x32;
    type Half = F32x16;
    type Words = U32x32;
    type Table = F32x16;

    const PREFETCH: Prefetch = Prefetch { distance: 8192, cache: Cache::Second };

    #[inline(always)]
    unsafe fn assume() -> Self {
        Avx512(())
    }

    #[inline(always)]
    fn splat(self, value: f32) -> F32x32 {
        registers!(F32x32, |_i| _mm512_set1_ps(value))
    }

    #[inline(always)]
    fn splat_half(self, value: f32) -> F32x16 {
        // SAFETY: `Avx512` exists only where the CPU has the instructions.
        unsafe { F32x16(_mm512_set1_ps(value)) }
    }

    #[inline(always)]
    fn half(self, values: &[f32]) -> F32x16 {
        // SAFETY: the slice holds a register of sixteen lanes.
        unsafe { F32x16(_mm512_loadu_ps(values[..HALF].as_ptr())) }
    }

    #[inline(always)]
    fn load(self, values: &[f32; LANES]) -> F32x32 {
        registers!(F32x32, |i| _mm512_loadu_ps(values.as_ptr().add(16 * i)))
    }

    #[inline(always)]
    fn load_words(self, bytes: &[u8; 4 * LANES]) -> U32x32 {
        registers!(U32x32, |i| _mm512_loadu_si512(bytes.as_ptr().add(64 * i).cast()))
    }

    #[inline(always)]
    fn load_f16(self, bytes: &[u8; 2 * LANES]) -> F32x32 {
        registers!(F32x32, |i| _mm512_cvtph_ps(_mm256_loadu_si256(bytes.as_ptr().add(32 * i).cast())))
    }

    #[inline(always)]
    fn load_bf16(self, bytes: &[u8; 2 * LANES]) -> F32x32 {
        registers!(F32x32, |i| {
            let halves = _mm256_loadu_si256(bytes.as_ptr().add(32 * i).cast());
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves)))
        })
    }

    #[inline(always)]
    fn load_i8(self, bytes: &[u8; LANES]) -> F32x32 {
        registers!(F32x32, |i| {
            _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(bytes.as_ptr().add(16 * i).cast())))
        })
    }

    #[inline(always)]
    fn f32s(self, words: U32x32) -> F32x32 {
        lanewise!(_mm512_castsi512_ps(words))
    }

    #[inline(always)]
    fn bf16_pair(self, words: U32x32) -> (F32x32, F32x32) {
        #[inline(always)]
        unsafe fn lower(words: __m512i) -> __m512 {
            // SAFETY: the caller has AVX-512.
            unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(words)) }
        }
        #[inline(always)]
        unsafe fn upper(words: __m512i) -> __m512 {
            // SAFETY: the caller has AVX-512.
            unsafe { _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(0xffff_0000_u32 as i32))) }
        }
        (lanewise!(lower(words)), lanewise!(upper(words)))
    }

    #[inline(always)]
    fn masked(self, words: U32x32, shift: u32, mask: u32) -> U32x32 {
        #[inline(always)]
        unsafe fn register(words: __m512i, shift: u32, mask: u32) -> __m512i {
            // SAFETY: the caller has AVX-512.
            unsafe {
                let shifted = _mm512_srlv_epi32(words, _mm512_set1_epi32(shift as i32));
                _mm512_and_si512(shifted, _mm512_set1_epi32((mask * 0x0001_0001) as i32))
            }
        }
        // SAFETY: `Avx512` exists only where the CPU has the instructions.
        unsafe { U32x32(register(words.0, shift, mask), register(words.1, shift, mask)) }
    }

    #[inline(always)]
    fn or(self, a: U32x32, b: U32x32) -> U32x32 {
        // SAFETY: as in `masked`.
        unsafe { U32x32(_mm512_or_si512(a.0, b.0), _mm512_or_si512(a.1, b.1)) }
    }

    #[inline(always)]
    fn field_pair<const BITS: u32>(self, words: U32x32, position: u32) -> (F32x32, F32x32) {
        if BITS <= LOOKED_UP_BITS {
            return self.bf16_pair(looked_up::<BITS>(words, position));
        }
        (signed_field::<BITS>(words, position), signed_field::<BITS>(words, 16 + position))
    }

    #[inline(always)]
    fn table(self, values: &[f32; 16]) -> F32x16 {
        self.half(values)
    }

    #[inline(always)]
    fn table4_pair<const PAIR: u32>(self, table: F32x16, words: U32x32) -> (F32x32, F32x32) {
        (from_table(table, words, 4 * PAIR), from_table(table, words, 16 + 4 * PAIR))
    }
}

/// Signed numbers of so many bits have a table of bfloat16 in a register.
pub(super) const LOOKED_UP_BITS: u32 = 5;

/// The signed number in the lowest `BITS` bits of each index as bfloat16, exact.
const fn signed_numbers<const BITS: u32>() -> [u16; 32] {
    let mut table = [0; 32];
    let mut i = 0;
    while i < 32 {
        let value = (i as i32) << (32 - BITS) >> (32 - BITS);
        table[i] = ((value as f32).to_bits() >> 16) as u16;
        i += 1;
    }
    table
}

/// The signed number of `BITS` bits at `position` of each half word as bfloat16. The look-up reads five bits; the table
/// repeats, so the bits above do not matter and need no mask.
#[inline(always)]
pub(super) fn looked_up<const BITS: u32>(words: U32x32, position: u32) -> U32x32 {
    #[inline(always)]
    unsafe fn register(words: __m512i, position: u32, table: &[u16; 32]) -> __m512i {
        // SAFETY: the caller has AVX-512 BW; the table is as long as a register.
        unsafe {
            let table = _mm512_loadu_si512(table.as_ptr().cast());
            let codes = _mm512_srlv_epi16(words, _mm512_set1_epi16(position as i16));
            _mm512_permutexvar_epi16(codes, table)
        }
    }
    let table = const { &signed_numbers::<BITS>() };
    // SAFETY: the words come from `Avx512::load_words`.
    unsafe { U32x32(register(words.0, position, table), register(words.1, position, table)) }
}

/// What the field of 4 bits at `position` stands for: the look-up reads no more bits than those.
#[inline(always)]
fn from_table(table: F32x16, words: U32x32, position: u32) -> F32x32 {
    #[inline(always)]
    unsafe fn register(table: F32x16, words: __m512i, position: u32) -> __m512 {
        // SAFETY: the caller has AVX-512.
        unsafe { _mm512_permutexvar_ps(_mm512_srlv_epi32(words, _mm512_set1_epi32(position as i32)), table.0) }
    }
    // SAFETY: the words come from `Avx512::load_words`.
    unsafe { F32x32(register(table, words.0, position), register(table, words.1, position)) }
}

/// The signed number of `BITS` bits at `position`.
#[inline(always)]
fn signed_field<const BITS: u32>(words: U32x32, position: u32) -> F32x32 {
    #[inline(always)]
    unsafe fn register<const BITS: u32>(words: __m512i, position: u32) -> __m512 {
        let up = 32u32.wrapping_sub(BITS).wrapping_sub(position) as i32;
        // SAFETY: the caller has AVX-512.
        unsafe {
            let high = _mm512_sllv_epi32(words, _mm512_set1_epi32(up));
            _mm512_cvtepi32_ps(_mm512_srav_epi32(high, _mm512_set1_epi32(32 - BITS as i32)))
        }
    }
    // SAFETY: the words come from `Avx512::load_words`.
    unsafe { F32x32(register::<BITS>(words.0, position), register::<BITS>(words.1, position)) }
}
