use std::arch::x86_64::*;

use crate::avx2::Avx2;
use crate::integer_level::IntegerLevel;

/// Products of int8 by AVX-VNNI.
#[derive(Clone, Copy)]
pub(crate) struct Vnni;

/// AVX-VNNI multiplies unsigned bytes with signed ones and adds four neighbours in 32 bits (`vpdpbusd`).
impl IntegerLevel for Avx2<Vnni> {
    type Codes = __m256i;
    type Partial = __m256i;
    type Sums = __m256i;
    type Floats = __m256;
    const ROWS: usize = 8;
    // Four products are added to a lane at a time.
    const RUN_LIMIT: usize = i32::MAX as usize / (4 * 127);
    // A product takes four or five cycles, and up to two start in each.
    const SUMS_UNDER_WAY: usize = 8;
    const BYTE_CENTRE: i32 = 128;

    #[inline(always)]
    unsafe fn load_codes(self, words: *const u8) -> __m256i {
        // SAFETY: the caller's pointer reaches a register.
        unsafe { _mm256_loadu_si256(words.cast()) }
    }

    #[inline(always)]
    unsafe fn store_codes(self, codes: __m256i, out: *mut u8) {
        // SAFETY: the caller's pointer has room for a register.
        unsafe { _mm256_storeu_si256(out.cast(), codes) }
    }

    #[inline(always)]
    fn masked_bytes(self, words: __m256i, shift: u32, mask: u8) -> __m256i {
        // SAFETY: `Avx2` exists only where the CPU has the instructions.
        unsafe {
            let shifted = _mm256_srl_epi16(words, _mm_cvtsi32_si128(shift as i32));
            _mm256_and_si256(shifted, _mm256_set1_epi8(mask as i8))
        }
    }

    #[inline(always)]
    fn or_bytes(self, a: __m256i, b: __m256i) -> __m256i {
        // SAFETY: as in `masked_bytes`.
        unsafe { _mm256_or_si256(a, b) }
    }

    #[inline(always)]
    fn bytes(self, words: __m256i) -> __m256i {
        words
    }

    /// The values plus 128, as unsigned bytes.
    #[inline(always)]
    fn byte_table(self, values: &[i8; 16]) -> __m256i {
        // SAFETY: as in `masked_bytes`; the array is as long as half a register.
        unsafe {
            let values = _mm256_broadcastsi128_si256(_mm_loadu_si128(values.as_ptr().cast()));
            _mm256_xor_si256(values, _mm256_set1_epi8(i8::MIN))
        }
    }

    #[inline(always)]
    fn look_up(self, table: __m256i, fields: __m256i) -> __m256i {
        // SAFETY: as in `masked_bytes`.
        unsafe { _mm256_shuffle_epi8(table, fields) }
    }

    #[inline(always)]
    fn splat_sum(self, value: i32) -> __m256i {
        // SAFETY: as in `masked_bytes`.
        unsafe { _mm256_set1_epi32(value) }
    }

    #[inline(always)]
    fn add_sums(self, a: __m256i, b: __m256i) -> __m256i {
        // SAFETY: as in `masked_bytes`.
        unsafe { _mm256_add_epi32(a, b) }
    }

    #[inline(always)]
    fn open(self, sums: __m256i) -> __m256i {
        sums
    }

    #[inline(always)]
    fn multiply_fields(self, partial: __m256i, codes: __m256i, x: u32) -> __m256i {
        self.multiply_bytes(partial, codes, x)
    }

    #[inline(always)]
    fn close(self, _: __m256i, partial: __m256i) -> __m256i {
        partial
    }

    #[inline(always)]
    fn multiply_bytes(self, sums: __m256i, bytes: __m256i, x: u32) -> __m256i {
        // SAFETY: as in `masked_bytes`.
        unsafe { _mm256_dpbusd_avx_epi32(sums, bytes, _mm256_set1_epi32(x as i32)) }
    }

    #[inline(always)]
    fn floats(self, sums: __m256i) -> __m256 {
        // SAFETY: as in `masked_bytes`.
        unsafe { _mm256_cvtepi32_ps(sums) }
    }

    #[inline(always)]
    unsafe fn subtract(self, values: __m256, zero_points: *const f32, x_sum: f32) -> __m256 {
        // SAFETY: as in `masked_bytes`; the caller's pointer reaches a register.
        unsafe { _mm256_fnmadd_ps(_mm256_loadu_ps(zero_points), _mm256_set1_ps(x_sum), values) }
    }

    #[inline(always)]
    unsafe fn add_scaled(self, values: __m256, scales: *const f32, x_scale: f32, totals: *mut f32) {
        // SAFETY: as in `masked_bytes`; the caller's pointers reach a register each.
        unsafe {
            let scales = _mm256_mul_ps(_mm256_loadu_ps(scales), _mm256_set1_ps(x_scale));
            _mm256_storeu_ps(totals, _mm256_fmadd_ps(values, scales, _mm256_loadu_ps(totals)));
        }
    }

    #[inline(always)]
    unsafe fn add_product(self, values: *const f32, factor: f32, totals: *mut f32) {
        // SAFETY: as in `masked_bytes`; the caller's pointers reach a register each.
        unsafe {
            let sum = _mm256_fmadd_ps(_mm256_loadu_ps(values), _mm256_set1_ps(factor), _mm256_loadu_ps(totals));
            _mm256_storeu_ps(totals, sum);
        }
    }
}
