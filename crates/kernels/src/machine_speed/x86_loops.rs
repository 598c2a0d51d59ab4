use std::arch::x86_64::*;
use std::hint::black_box;

use kintsugi_runtime::{CpuFeatures, CpuLevel};

use super::ArithmeticCeiling;
use super::ceilings::{F32_FACTORS, INDEPENDENT, INT8_FACTORS, TURNS};
use crate::Arithmetic;

/// The ceilings of a level that this CPU has; `None` where the portable ones are its own.
pub(super) fn arithmetic_ceilings(level: CpuLevel) -> Option<Vec<ArithmeticCeiling>> {
    assert!(level.is_available(), "loops run only with the instructions of this CPU");
    let new = ArithmeticCeiling::new;
    match level {
        CpuLevel::Avx512Vnni => {
            let mut ceilings = vec![
                // SAFETY: the level has AVX-512 F and VNNI.
                new(Arithmetic::Int8, "vpdpbusd zmm", 128, || unsafe { dpbusd_avx512() }),
                // SAFETY: as above.
                new(Arithmetic::F32, "vfmadd231ps zmm", 32, || unsafe { fma_avx512() }),
            ];
            if CpuFeatures::detect().avx512_bf16 {
                // SAFETY: as above, and BF16 was detected.
                ceilings.push(new(Arithmetic::Bf16, "vdpbf16ps zmm", 64, || unsafe { dpbf16_avx512() }));
            }
            Some(ceilings)
        }
        CpuLevel::AvxVnni => Some(vec![
            // SAFETY: the level has AVX2, FMA and AVX-VNNI.
            new(Arithmetic::Int8, "vpdpbusd ymm", 64, || unsafe { dpbusd_avxvnni() }),
            // SAFETY: as above.
            new(Arithmetic::F32, "vfmadd231ps ymm", 16, || unsafe { fma_avx2() }),
        ]),
        CpuLevel::Avx2 => Some(vec![
            // SAFETY: the level has AVX2 and FMA.
            new(Arithmetic::Int8, "vpmaddubsw and vpaddw ymm", 64, || unsafe { maddubs_avx2() }),
            // SAFETY: as above.
            new(Arithmetic::F32, "vfmadd231ps ymm", 16, || unsafe { fma_avx2() }),
        ]),
        _ => None,
    }
}

/// Adds up some words, read with the widest loads of this CPU; `None` where it has none wider than those of portable code.
pub(super) fn sum(words: &[u64]) -> Option<u64> {
    match CpuLevel::best() {
        // SAFETY: this CPU has AVX-512.
        CpuLevel::Avx512Vnni => Some(unsafe { sum_avx512(words) }),
        // SAFETY: this CPU has AVX2.
        CpuLevel::Avx2 | CpuLevel::AvxVnni => Some(unsafe { sum_avx2(words) }),
        _ => None,
    }
}

#[target_feature(enable = "avx512f")]
fn sum_avx512(values: &[u64]) -> u64 {
    let (lines, rest) = values.as_chunks::<64>();
    let mut sums = [_mm512_setzero_si512(); 8];
    for line in lines {
        for i in 0..8 {
            // SAFETY: the eight registers cover the 64 values of the line.
            let part = unsafe { _mm512_loadu_si512(line.as_ptr().add(8 * i).cast()) };
            sums[i] = _mm512_add_epi64(sums[i], part);
        }
    }
    // SAFETY: a register is eight of these words.
    unsafe { lanes::<_, u64>(&sums) }.iter().chain(rest).fold(0, |sum, value| sum.wrapping_add(*value))
}

#[target_feature(enable = "avx2")]
fn sum_avx2(values: &[u64]) -> u64 {
    let (lines, rest) = values.as_chunks::<32>();
    let mut sums = [_mm256_setzero_si256(); 8];
    for line in lines {
        for i in 0..8 {
            // SAFETY: the eight registers cover the 32 values of the line.
            let part = unsafe { _mm256_loadu_si256(line.as_ptr().add(4 * i).cast()) };
            sums[i] = _mm256_add_epi64(sums[i], part);
        }
    }
    // SAFETY: a register is four of these words.
    unsafe { lanes::<_, u64>(&sums) }.iter().chain(rest).fold(0, |sum, value| sum.wrapping_add(*value))
}

/// The numbers in some registers.
///
/// # Safety
/// A register consists of such numbers, for which all bits are good.
unsafe fn lanes<Register, Lane>(registers: &[Register]) -> &[Lane] {
    // SAFETY: the same bytes; registers are aligned to more than their lanes.
    unsafe { std::slice::from_raw_parts(registers.as_ptr().cast(), size_of_val(registers) / size_of::<Lane>()) }
}

/// A loop over [`INDEPENDENT`] sums. What they start from is hidden from the compiler, which would keep equal ones once.
macro_rules! sums {
    (
        $(#[$attribute:meta])*
        $name:ident, $features:literal, $operands:expr,
        [$lane:ty] $zero:expr, |$sum:ident, $a:pat_param, $b:pat_param| $next:expr $(,)?
    ) => {
        $(#[$attribute])*
        #[target_feature(enable = $features)]
        fn $name() -> f64 {
            let ($a, $b) = black_box($operands);
            let mut sums = black_box([$zero; INDEPENDENT]);
            for _ in 0..TURNS {
                for register in &mut sums {
                    let $sum = *register;
                    *register = $next;
                }
            }
            // SAFETY: a register consists of lanes of that type.
            unsafe { lanes::<_, $lane>(&sums) }.iter().map(|&lane| f64::from(lane)).sum()
        }
    };
}

sums! {
    dpbusd_avx512, "avx512f,avx512vnni",
    (_mm512_set1_epi8(INT8_FACTORS.0), _mm512_set1_epi8(INT8_FACTORS.1)),
    [i32] _mm512_setzero_si512(), |sum, a, b| _mm512_dpbusd_epi32(sum, a, b),
}

sums! {
    fma_avx512, "avx512f",
    (_mm512_set1_ps(F32_FACTORS.0), _mm512_set1_ps(F32_FACTORS.1)),
    [f32] _mm512_setzero_ps(), |sum, a, b| _mm512_fmadd_ps(a, b, sum),
}

sums! {
    dpbf16_avx512, "avx512f,avx512bf16",
    (bf16_avx512(F32_FACTORS.0), bf16_avx512(F32_FACTORS.1)),
    [f32] _mm512_setzero_ps(), |sum, a, b| _mm512_dpbf16_ps(sum, a, b),
}

sums! {
    dpbusd_avxvnni, "avx2,avxvnni",
    (_mm256_set1_epi8(INT8_FACTORS.0), _mm256_set1_epi8(INT8_FACTORS.1)),
    [i32] _mm256_setzero_si256(), |sum, a, b| _mm256_dpbusd_avx_epi32(sum, a, b),
}

sums! {
    /// A product depends on its sum, so that it cannot be taken out of the loop.
    maddubs_avx2, "avx2",
    (_mm256_set1_epi8(3), ()),
    [i16] _mm256_setzero_si256(), |sum, a, ()| _mm256_add_epi16(a, _mm256_maddubs_epi16(a, sum)),
}

sums! {
    fma_avx2, "avx2,fma",
    (_mm256_set1_ps(F32_FACTORS.0), _mm256_set1_ps(F32_FACTORS.1)),
    [f32] _mm256_setzero_ps(), |sum, a, b| _mm256_fmadd_ps(a, b, sum),
}

/// A number that bf16 holds, in every lane.
#[target_feature(enable = "avx512f,avx512bf16")]
fn bf16_avx512(value: f32) -> __m512bh {
    let words = _mm512_set1_epi16((value.to_bits() >> 16) as i16);
    // SAFETY: both types are 512 plain bits.
    unsafe { std::mem::transmute::<__m512i, __m512bh>(words) }
}
