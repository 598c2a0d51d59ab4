use std::arch::x86_64::*;
use std::hint::black_box;

use kintsugi_runtime::{CpuFeatures, CpuLevel};

use super::ArithmeticCeiling;
use super::ceilings::{INDEPENDENT, TURNS};
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

/// Reads some words with the widest loads of this CPU; `false` where it has none wider than those of portable code.
pub(super) fn read(words: &[u64]) -> bool {
    match CpuLevel::best() {
        // SAFETY: this CPU has AVX-512.
        CpuLevel::Avx512Vnni => unsafe { sum_avx512(words) },
        // SAFETY: this CPU has AVX2.
        CpuLevel::Avx2 | CpuLevel::AvxVnni => unsafe { sum_avx2(words) },
        _ => return false,
    }
    true
}

#[target_feature(enable = "avx512f")]
fn sum_avx512(values: &[u64]) {
    let mut sums = [_mm512_setzero_si512(); 8];
    for line in values.as_chunks::<64>().0 {
        for i in 0..8 {
            // SAFETY: the eight registers cover the 64 values of the line.
            let part = unsafe { _mm512_loadu_si512(line.as_ptr().add(8 * i).cast()) };
            sums[i] = _mm512_add_epi64(sums[i], part);
        }
    }
    black_box(sums);
}

#[target_feature(enable = "avx2")]
fn sum_avx2(values: &[u64]) {
    let mut sums = [_mm256_setzero_si256(); 8];
    for line in values.as_chunks::<32>().0 {
        for i in 0..8 {
            // SAFETY: the eight registers cover the 32 values of the line.
            let part = unsafe { _mm256_loadu_si256(line.as_ptr().add(4 * i).cast()) };
            sums[i] = _mm256_add_epi64(sums[i], part);
        }
    }
    black_box(sums);
}

#[target_feature(enable = "avx512f,avx512vnni")]
fn dpbusd_avx512() {
    let (a, b) = black_box((_mm512_set1_epi8(3), _mm512_set1_epi8(5)));
    let mut sums = [_mm512_setzero_si512(); INDEPENDENT];
    for _ in 0..TURNS {
        for sum in &mut sums {
            *sum = _mm512_dpbusd_epi32(*sum, a, b);
        }
    }
    black_box(sums);
}

#[target_feature(enable = "avx512f")]
fn fma_avx512() {
    let (a, b) = black_box((_mm512_set1_ps(0.5), _mm512_set1_ps(0.25)));
    let mut sums = [_mm512_setzero_ps(); INDEPENDENT];
    for _ in 0..TURNS {
        for sum in &mut sums {
            *sum = _mm512_fmadd_ps(*sum, a, b);
        }
    }
    black_box(sums);
}

#[target_feature(enable = "avx512f,avx512bf16")]
fn dpbf16_avx512() {
    // SAFETY: both types are 512 plain bits.
    let as_bf16 = |words: __m512i| unsafe { std::mem::transmute::<__m512i, __m512bh>(words) };
    let (a, b) = black_box((as_bf16(_mm512_set1_epi16(0x3f00)), as_bf16(_mm512_set1_epi16(0x3e80))));
    let mut sums = [_mm512_setzero_ps(); INDEPENDENT];
    for _ in 0..TURNS {
        for sum in &mut sums {
            *sum = _mm512_dpbf16_ps(*sum, a, b);
        }
    }
    black_box(sums);
}

#[target_feature(enable = "avx2,avxvnni")]
fn dpbusd_avxvnni() {
    let (a, b) = black_box((_mm256_set1_epi8(3), _mm256_set1_epi8(5)));
    let mut sums = [_mm256_setzero_si256(); INDEPENDENT];
    for _ in 0..TURNS {
        for sum in &mut sums {
            *sum = _mm256_dpbusd_avx_epi32(*sum, a, b);
        }
    }
    black_box(sums);
}

#[target_feature(enable = "avx2")]
fn maddubs_avx2() {
    let a = black_box(_mm256_set1_epi8(3));
    let mut sums = [_mm256_setzero_si256(); INDEPENDENT];
    for _ in 0..TURNS {
        for sum in &mut sums {
            // The product depends on the sum, so that it cannot be taken out of the loop.
            *sum = _mm256_add_epi16(a, _mm256_maddubs_epi16(a, *sum));
        }
    }
    black_box(sums);
}

#[target_feature(enable = "avx2,fma")]
fn fma_avx2() {
    let (a, b) = black_box((_mm256_set1_ps(0.5), _mm256_set1_ps(0.25)));
    let mut sums = [_mm256_setzero_ps(); INDEPENDENT];
    for _ in 0..TURNS {
        for sum in &mut sums {
            *sum = _mm256_fmadd_ps(*sum, a, b);
        }
    }
    black_box(sums);
}
