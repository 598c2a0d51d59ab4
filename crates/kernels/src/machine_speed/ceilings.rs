use std::hint::black_box;
use std::time::Instant;

use kintsugi_runtime::{CpuFeatures, CpuLevel, ThreadPool};

use crate::{Arithmetic, Kernels};

/// Calls of a loop that are measured together.
const CALLS: usize = 256;

/// Turns of a loop: some tens of microseconds, less than a scheduler gives a thread at a time.
const TURNS: usize = 1 << 13;

/// Instructions of each kind in a turn: more than are under way at once.
const INDEPENDENT: usize = 12;

/// A loop that keeps the multipliers of a thread busy and does nothing else: no product of that arithmetic is faster.
pub struct ArithmeticCeiling {
    arithmetic: Arithmetic,
    instructions: &'static str,
    operations: f64,
    run: fn(),
}

impl ArithmeticCeiling {
    /// Those of the level of `kernels`, one for each arithmetic that its CPU has instructions for.
    pub fn of(kernels: &Kernels) -> Vec<ArithmeticCeiling> {
        // `Kernels` exist only for levels that this CPU has.
        #[cfg(target_arch = "x86_64")]
        match kernels.level() {
            CpuLevel::Avx512Vnni => {
                let mut ceilings = vec![
                    // SAFETY: the level has AVX-512 F and VNNI.
                    Self::new(Arithmetic::Int8, "vpdpbusd zmm", 128, || unsafe { x86::dpbusd_avx512() }),
                    // SAFETY: as above.
                    Self::new(Arithmetic::F32, "vfmadd231ps zmm", 32, || unsafe { x86::fma_avx512() }),
                ];
                if CpuFeatures::detect().avx512_bf16 {
                    // SAFETY: as above, and BF16 was detected.
                    let run = || unsafe { x86::dpbf16_avx512() };
                    ceilings.push(Self::new(Arithmetic::Bf16, "vdpbf16ps zmm", 64, run));
                }
                return ceilings;
            }
            CpuLevel::AvxVnni => {
                return vec![
                    // SAFETY: the level has AVX2, FMA and AVX-VNNI.
                    Self::new(Arithmetic::Int8, "vpdpbusd ymm", 64, || unsafe { x86::dpbusd_avxvnni() }),
                    // SAFETY: as above.
                    Self::new(Arithmetic::F32, "vfmadd231ps ymm", 16, || unsafe { x86::fma_avx2() }),
                ];
            }
            CpuLevel::Avx2 => {
                return vec![
                    // SAFETY: the level has AVX2 and FMA.
                    Self::new(Arithmetic::Int8, "vpmaddubsw and vpaddw ymm", 64, || unsafe { x86::maddubs_avx2() }),
                    // SAFETY: as above.
                    Self::new(Arithmetic::F32, "vfmadd231ps ymm", 16, || unsafe { x86::fma_avx2() }),
                ];
            }
            _ => {}
        }
        vec![
            Self::new(Arithmetic::Int8, "portable 16-bit products and sums", 2 * PORTABLE_I16, portable_i16),
            Self::new(Arithmetic::F32, "portable f32 products and sums", 2 * PORTABLE_F32, portable_f32),
        ]
    }

    fn new(arithmetic: Arithmetic, instructions: &'static str, operations: usize, run: fn()) -> Self {
        ArithmeticCeiling { arithmetic, instructions, operations: (TURNS * INDEPENDENT * operations) as f64, run }
    }

    /// What is multiplied.
    pub fn arithmetic(&self) -> Arithmetic {
        self.arithmetic
    }

    /// The instructions of the loop.
    pub fn instructions(&self) -> &'static str {
        self.instructions
    }

    /// Operations per second of all threads of the pool together: products and sums count one each.
    pub fn rate(&self, pool: &ThreadPool) -> f64 {
        let start = Instant::now();
        pool.for_each(CALLS, |_| (self.run)());
        self.operations * CALLS as f64 / start.elapsed().as_secs_f64()
    }

    /// Operations per second of the calling thread in a single call of the loop, which a scheduler rarely interrupts.
    pub fn rate_of_one_call(&self) -> f64 {
        let start = Instant::now();
        (self.run)();
        self.operations / start.elapsed().as_secs_f64()
    }
}

/// A loop that only reads memory: no product gets its weights faster.
pub struct ReadingCeiling {
    words: Vec<u64>,
}

impl ReadingCeiling {
    /// Words of a task: as many bytes as those of a product have.
    const PIECE: usize = (256 << 10) / size_of::<u64>();

    /// A loop over that many bytes, rounded up to whole tasks.
    pub fn new(bytes: usize) -> Self {
        ReadingCeiling { words: vec![1; bytes.div_ceil(Self::PIECE * size_of::<u64>()).max(1) * Self::PIECE] }
    }

    /// Bytes that are read.
    pub fn bytes(&self) -> usize {
        size_of_val(self.words.as_slice())
    }

    /// Bytes per second of all threads of the pool together, with the widest loads of this CPU.
    pub fn rate(&self, pool: &ThreadPool) -> f64 {
        let start = Instant::now();
        pool.for_each(self.words.len() / Self::PIECE, |piece| {
            let piece = &self.words[piece * Self::PIECE..][..Self::PIECE];
            #[cfg(target_arch = "x86_64")]
            match CpuLevel::best() {
                // SAFETY: this CPU has AVX-512.
                CpuLevel::Avx512Vnni => return unsafe { x86::sum_avx512(piece) },
                // SAFETY: this CPU has AVX2.
                CpuLevel::Avx2 | CpuLevel::AvxVnni => return unsafe { x86::sum_avx2(piece) },
                _ => {}
            }
            black_box(piece.iter().fold(0u64, |sum, value| sum.wrapping_add(*value)));
        });
        self.bytes() as f64 / start.elapsed().as_secs_f64()
    }
}

/// Lanes of a portable instruction, which a compiler makes of vectors of 128 bits.
const PORTABLE_I16: usize = 8;
const PORTABLE_F32: usize = 4;

/// Products of int8 fit into 16 bits.
fn portable_i16() {
    let (a, b) = black_box((3i16, 5i16));
    let mut sums = [1i16; PORTABLE_I16 * INDEPENDENT];
    for _ in 0..TURNS {
        for sum in &mut sums {
            *sum = sum.wrapping_mul(a).wrapping_add(b);
        }
    }
    black_box(sums);
}

fn portable_f32() {
    let (a, b) = black_box((0.5f32, 0.25f32));
    let mut sums = [1.0f32; PORTABLE_F32 * INDEPENDENT];
    for _ in 0..TURNS {
        for sum in &mut sums {
            *sum = *sum * a + b;
        }
    }
    black_box(sums);
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    use super::{INDEPENDENT, TURNS};

    #[target_feature(enable = "avx512f")]
    pub(super) fn sum_avx512(values: &[u64]) {
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
    pub(super) fn sum_avx2(values: &[u64]) {
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
    pub(super) fn dpbusd_avx512() {
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
    pub(super) fn fma_avx512() {
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
    pub(super) fn dpbf16_avx512() {
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
    pub(super) fn dpbusd_avxvnni() {
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
    pub(super) fn maddubs_avx2() {
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
    pub(super) fn fma_avx2() {
        let (a, b) = black_box((_mm256_set1_ps(0.5), _mm256_set1_ps(0.25)));
        let mut sums = [_mm256_setzero_ps(); INDEPENDENT];
        for _ in 0..TURNS {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(*sum, a, b);
            }
        }
        black_box(sums);
    }
}
