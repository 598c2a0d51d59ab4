use std::arch::x86_64::*;
use std::marker::PhantomData;

use crate::strip::HALF;
use crate::vector::{Half, LANES, Level, Vector};

/// 32 lanes in four registers.
#[derive(Clone, Copy)]
pub(crate) struct F32x32(__m256, __m256, __m256, __m256);

/// 16 lanes in two registers.
#[derive(Clone, Copy)]
pub(crate) struct F32x16(__m256, __m256);

/// 32 words in four registers.
#[derive(Clone, Copy)]
pub(crate) struct U32x32(__m256i, __m256i, __m256i, __m256i);

/// AVX2, FMA and F16C, and `I` for products of int8. A value exists only where the CPU has them.
#[derive(Clone, Copy)]
pub(crate) struct Avx2<I = Maddubs>(PhantomData<I>);

/// Products of int8 by instructions of AVX2 alone.
#[derive(Clone, Copy)]
pub(crate) struct Maddubs;

/// An intrinsic on each of the four registers of its arguments.
macro_rules! lanewise {
    ($intrinsic:ident($($argument:expr),*)) => {
        // SAFETY: values of these types exist only where `Avx2::assume` was sound.
        unsafe {
            F32x32(
                $intrinsic($($argument.0),*),
                $intrinsic($($argument.1),*),
                $intrinsic($($argument.2),*),
                $intrinsic($($argument.3),*),
            )
        }
    };
}

/// A vector whose four registers are the values of an expression over the index of the register.
macro_rules! registers {
    ($kind:ident, |$i:ident| $value:expr) => {
        // SAFETY: `Avx2` exists only where the CPU has the instructions, and the caller's arrays hold 32 elements.
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
                {
                    let $i = 2usize;
                    $value
                },
                {
                    let $i = 3usize;
                    $value
                },
            )
        }
    };
}

impl Vector for F32x32 {
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        lanewise!(_mm256_add_ps(self, other))
    }

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        lanewise!(_mm256_sub_ps(self, other))
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        lanewise!(_mm256_mul_ps(self, other))
    }

    #[inline(always)]
    fn div(self, other: Self) -> Self {
        lanewise!(_mm256_div_ps(self, other))
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        lanewise!(_mm256_fmadd_ps(self, factor, addend))
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        lanewise!(_mm256_max_ps(self, other))
    }

    #[inline(always)]
    fn min(self, other: Self) -> Self {
        lanewise!(_mm256_min_ps(self, other))
    }

    #[inline(always)]
    fn power_of_two(self) -> Self {
        #[inline(always)]
        unsafe fn register(lanes: __m256) -> __m256 {
            // SAFETY: the caller has AVX2.
            unsafe {
                let exponent = _mm256_slli_epi32::<23>(_mm256_castps_si256(lanes));
                _mm256_castsi256_ps(_mm256_add_epi32(exponent, _mm256_set1_epi32(0x3f80_0000)))
            }
        }
        lanewise!(register(self))
    }

    #[inline(always)]
    fn store(self, out: &mut [f32; LANES]) {
        let out = out.as_mut_ptr();
        // SAFETY: `out` has room for four registers of eight lanes.
        unsafe {
            _mm256_storeu_ps(out, self.0);
            _mm256_storeu_ps(out.add(8), self.1);
            _mm256_storeu_ps(out.add(16), self.2);
            _mm256_storeu_ps(out.add(24), self.3);
        }
    }
}

impl Half for F32x16 {
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        // SAFETY: values of this type exist only where `Avx2::assume` was sound.
        unsafe { F32x16(_mm256_add_ps(self.0, other.0), _mm256_add_ps(self.1, other.1)) }
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        // SAFETY: values of this type exist only where `Avx2::assume` was sound.
        unsafe { F32x16(_mm256_fmadd_ps(self.0, factor.0, addend.0), _mm256_fmadd_ps(self.1, factor.1, addend.1)) }
    }

    #[inline(always)]
    fn store(self, out: &mut [f32]) {
        let out = out[..HALF].as_mut_ptr();
        // SAFETY: `out` has room for two registers of eight lanes.
        unsafe {
            _mm256_storeu_ps(out, self.0);
            _mm256_storeu_ps(out.add(8), self.1);
        }
    }
}

impl<I: Copy> Level for Avx2<I> {
    type Vector = F32x32;
    type Half = F32x16;
    type Words = U32x32;
    type Table = F32x16;

    #[inline(always)]
    unsafe fn assume() -> Self {
        Avx2(PhantomData)
    }

    #[inline(always)]
    fn splat(self, value: f32) -> F32x32 {
        registers!(F32x32, |_i| _mm256_set1_ps(value))
    }

    #[inline(always)]
    fn splat_half(self, value: f32) -> F32x16 {
        // SAFETY: `Avx2` exists only where the CPU has the instructions.
        unsafe { F32x16(_mm256_set1_ps(value), _mm256_set1_ps(value)) }
    }

    #[inline(always)]
    fn half(self, values: &[f32]) -> F32x16 {
        let values = values[..HALF].as_ptr();
        // SAFETY: `values` holds two registers of eight lanes.
        unsafe { F32x16(_mm256_loadu_ps(values), _mm256_loadu_ps(values.add(8))) }
    }

    #[inline(always)]
    fn load(self, values: &[f32; LANES]) -> F32x32 {
        registers!(F32x32, |i| _mm256_loadu_ps(values.as_ptr().add(8 * i)))
    }

    #[inline(always)]
    fn load_words(self, bytes: &[u8; 4 * LANES]) -> U32x32 {
        registers!(U32x32, |i| _mm256_loadu_si256(bytes.as_ptr().add(32 * i).cast()))
    }

    #[inline(always)]
    fn load_f16(self, bytes: &[u8; 2 * LANES]) -> F32x32 {
        registers!(F32x32, |i| _mm256_cvtph_ps(_mm_loadu_si128(bytes.as_ptr().add(16 * i).cast())))
    }

    #[inline(always)]
    fn load_bf16(self, bytes: &[u8; 2 * LANES]) -> F32x32 {
        registers!(F32x32, |i| {
            let halves = _mm_loadu_si128(bytes.as_ptr().add(16 * i).cast());
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(halves)))
        })
    }

    #[inline(always)]
    fn load_i8(self, bytes: &[u8; LANES]) -> F32x32 {
        registers!(F32x32, |i| {
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(bytes.as_ptr().add(8 * i).cast())))
        })
    }

    #[inline(always)]
    fn f32s(self, words: U32x32) -> F32x32 {
        lanewise!(_mm256_castsi256_ps(words))
    }

    #[inline(always)]
    fn bf16_pair(self, words: U32x32) -> (F32x32, F32x32) {
        #[inline(always)]
        unsafe fn lower(words: __m256i) -> __m256 {
            // SAFETY: the caller has AVX2.
            unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(words)) }
        }
        #[inline(always)]
        unsafe fn upper(words: __m256i) -> __m256 {
            // SAFETY: the caller has AVX2.
            unsafe { _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(0xffff_0000_u32 as i32))) }
        }
        (lanewise!(lower(words)), lanewise!(upper(words)))
    }

    #[inline(always)]
    fn masked(self, words: U32x32, shift: u32, mask: u32) -> U32x32 {
        #[inline(always)]
        unsafe fn register(words: __m256i, shift: u32, mask: u32) -> __m256i {
            // SAFETY: the caller has AVX2.
            unsafe {
                let shifted = _mm256_srlv_epi32(words, _mm256_set1_epi32(shift as i32));
                _mm256_and_si256(shifted, _mm256_set1_epi32((mask * 0x0001_0001) as i32))
            }
        }
        // SAFETY: `Avx2` exists only where the CPU has the instructions.
        unsafe {
            U32x32(
                register(words.0, shift, mask),
                register(words.1, shift, mask),
                register(words.2, shift, mask),
                register(words.3, shift, mask),
            )
        }
    }

    #[inline(always)]
    fn or(self, a: U32x32, b: U32x32) -> U32x32 {
        // SAFETY: as in `masked`.
        unsafe {
            U32x32(
                _mm256_or_si256(a.0, b.0),
                _mm256_or_si256(a.1, b.1),
                _mm256_or_si256(a.2, b.2),
                _mm256_or_si256(a.3, b.3),
            )
        }
    }

    #[inline(always)]
    fn field_pair<const BITS: u32>(self, words: U32x32, position: u32) -> (F32x32, F32x32) {
        if BITS == 2 {
            return (looked_up(words, position), looked_up(words, 16 + position));
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

/// The signed number of 2 bits at `position`: the instruction looks at the lowest two bits alone.
#[inline(always)]
fn looked_up(words: U32x32, position: u32) -> F32x32 {
    #[inline(always)]
    unsafe fn register(words: __m256i, position: u32) -> __m256 {
        // SAFETY: the caller has AVX2.
        unsafe {
            let values = _mm256_setr_ps(0.0, 1.0, -2.0, -1.0, 0.0, 1.0, -2.0, -1.0);
            _mm256_permutevar_ps(values, _mm256_srlv_epi32(words, _mm256_set1_epi32(position as i32)))
        }
    }
    // SAFETY: the words come from `Avx2::load_words`.
    unsafe {
        F32x32(
            register(words.0, position),
            register(words.1, position),
            register(words.2, position),
            register(words.3, position),
        )
    }
}

/// What the field of 4 bits at `position` stands for: its lowest three bits choose in each half of the table, the
/// fourth chooses the half.
#[inline(always)]
fn from_table(table: F32x16, words: U32x32, position: u32) -> F32x32 {
    #[inline(always)]
    unsafe fn register(table: F32x16, words: __m256i, position: u32) -> __m256 {
        // SAFETY: the caller has AVX2.
        unsafe {
            let codes = _mm256_srlv_epi32(words, _mm256_set1_epi32(position as i32));
            let lower = _mm256_permutevar8x32_ps(table.0, codes);
            let upper = _mm256_permutevar8x32_ps(table.1, codes);
            _mm256_blendv_ps(lower, upper, _mm256_castsi256_ps(_mm256_slli_epi32::<28>(codes)))
        }
    }
    // SAFETY: the words come from `Avx2::load_words`.
    unsafe {
        F32x32(
            register(table, words.0, position),
            register(table, words.1, position),
            register(table, words.2, position),
            register(table, words.3, position),
        )
    }
}

/// The signed number of `BITS` bits at `position`.
#[inline(always)]
fn signed_field<const BITS: u32>(words: U32x32, position: u32) -> F32x32 {
    #[inline(always)]
    unsafe fn register<const BITS: u32>(words: __m256i, position: u32) -> __m256 {
        let up = 32u32.wrapping_sub(BITS).wrapping_sub(position) as i32;
        // SAFETY: the caller has AVX2.
        unsafe {
            let high = _mm256_sllv_epi32(words, _mm256_set1_epi32(up));
            _mm256_cvtepi32_ps(_mm256_srav_epi32(high, _mm256_set1_epi32(32 - BITS as i32)))
        }
    }
    // SAFETY: the words come from `Avx2::load_words`.
    unsafe {
        F32x32(
            register::<BITS>(words.0, position),
            register::<BITS>(words.1, position),
            register::<BITS>(words.2, position),
            register::<BITS>(words.3, position),
        )
    }
}
