use std::arch::x86_64::*;
use std::marker::PhantomData;

use super::vector::{Avx512, F32x32, LOOKED_UP_BITS, U32x32, looked_up};
use crate::codec::{Bf16, Bits, Codec, Encoding, code_words};
use crate::kernel_table::written_out;
use crate::vector::{LANES, Level};

/// Products of bf16 pairs (`vdpbf16ps`): codes and bf16 weights are exact in bf16, x is rounded to it.
///
/// The instruction takes subnormals as zero and rounds once per product.
pub(super) struct Bf16Products<E>(PhantomData<E>);

/// An encoding whose columns come in pairs of bf16.
pub(super) trait Bf16Encoding: Encoding<Avx512> {
    /// Columns `2·PAIR` and `2·PAIR + 1` of a step in the lower and the upper half of each word.
    ///
    /// # Safety
    /// `step` must point to the bytes of a step.
    unsafe fn words<const PAIR: u32>(level: Avx512, step: *const u8) -> U32x32;
}

impl<E: Bf16Encoding> Codec for Bf16Products<E> {
    type Level = Avx512;
    const BYTES: usize = E::BYTES;
    const X_WORDS: usize = E::COLUMNS / 2;
    type State = ();

    #[inline(always)]
    fn state(_: Avx512, _: &[f32; 16]) {}

    #[inline(always)]
    unsafe fn step<const ROWS: usize, const PANELS: usize>(
        level: Avx512,
        (): (),
        panels: [*const u8; PANELS],
        x: [*const u32; ROWS],
        sums: &mut [[F32x32; PANELS]; ROWS],
    ) {
        written_out!(PAIR < E::COLUMNS / 2 => {
            // SAFETY: the caller's pointers are good for one step, and this CPU has AVX512_BF16.
            unsafe { multiply::<E, PAIR, ROWS, PANELS>(level, panels, x, sums) }
        });
    }
}

#[inline(always)]
unsafe fn multiply<E: Bf16Encoding, const PAIR: u32, const ROWS: usize, const PANELS: usize>(
    level: Avx512,
    panels: [*const u8; PANELS],
    x: [*const u32; ROWS],
    sums: &mut [[F32x32; PANELS]; ROWS],
) {
    for panel in 0..PANELS {
        // SAFETY: the caller's pointers are good for one step; the halves of each word are a pair of bf16.
        unsafe {
            let U32x32(low, high) = E::words::<PAIR>(level, panels[panel]);
            let (low, high) = (as_bf16(low), as_bf16(high));
            for row in 0..ROWS {
                let pair = as_bf16(_mm512_set1_epi32(*x[row].add(PAIR as usize) as i32));
                let F32x32(first, second) = sums[row][panel];
                sums[row][panel] = F32x32(_mm512_dpbf16_ps(first, low, pair), _mm512_dpbf16_ps(second, high, pair));
            }
        }
    }
}

#[inline(always)]
pub(super) fn as_bf16(words: __m512i) -> __m512bh {
    // SAFETY: both types are 512 plain bits.
    unsafe { std::mem::transmute(words) }
}

impl<const BITS: u32> Bf16Encoding for Bits<BITS> {
    #[inline(always)]
    unsafe fn words<const PAIR: u32>(level: Avx512, step: *const u8) -> U32x32 {
        #[inline(always)]
        unsafe fn register(even: __m512, odd: __m512) -> __m512i {
            // SAFETY: the caller has AVX-512. Integers of 8 bits leave the lower half of a binary32 empty.
            unsafe { _mm512_or_si512(_mm512_srli_epi32::<16>(_mm512_castps_si512(even)), _mm512_castps_si512(odd)) }
        }
        // SAFETY: as the caller promises.
        unsafe {
            let (words, position) = code_words::<Avx512, BITS, PAIR>(level, step);
            if BITS <= LOOKED_UP_BITS {
                return looked_up::<BITS>(words, position);
            }
            let (even, odd) = level.field_pair::<BITS>(words, position);
            U32x32(register(even.0, odd.0), register(even.1, odd.1))
        }
    }
}

impl Bf16Encoding for Bf16 {
    #[inline(always)]
    unsafe fn words<const PAIR: u32>(level: Avx512, step: *const u8) -> U32x32 {
        // SAFETY: the caller's step has two pairs of columns.
        level.load_words(unsafe { &*step.add(4 * LANES * PAIR as usize).cast() })
    }
}
