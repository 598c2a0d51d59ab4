use std::arch::x86_64::*;

use super::vector::Avx2;
use crate::integer_level::IntegerLevel;

/// AVX2 multiplies unsigned bytes with signed ones and adds neighbours in 16 bits (`vpmaddubsw`).
///
/// Products of codes of up to 6 bits are added up in those 16 bits as long as they fit. Bytes are split into size and
/// sign, and the sign goes to x: 2 · 128 · 127 is the largest sum of two that there can be, and it fits too.
impl IntegerLevel for Avx2 {
    type Codes = __m256i;
    type Partial = __m256i;
    type Sums = __m256i;
    type Floats = __m256;
    const ROWS: usize = 8;
    // Two products are added to a lane at a time.
    const RUN_LIMIT: usize = i16::MAX as usize / (2 * 127);
    // Additions take a cycle.
    const SUMS_UNDER_WAY: usize = 1;
    const BYTE_CENTRE: i32 = 0;

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

    /// Codes minus 128, as signed bytes.
    #[inline(always)]
    fn bytes(self, words: __m256i) -> __m256i {
        // SAFETY: as in `masked_bytes`.
        unsafe { _mm256_xor_si256(words, _mm256_set1_epi8(i8::MIN)) }
    }

    #[inline(always)]
    fn byte_table(self, values: &[i8; 16]) -> __m256i {
        // SAFETY: as in `masked_bytes`; the array is as long as half a register.
        unsafe { _mm256_broadcastsi128_si256(_mm_loadu_si128(values.as_ptr().cast())) }
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
    fn open(self, _: __m256i) -> __m256i {
        // SAFETY: as in `masked_bytes`.
        unsafe { _mm256_setzero_si256() }
    }

    #[inline(always)]
    fn multiply_fields(self, partial: __m256i, codes: __m256i, x: u32) -> __m256i {
        // SAFETY: as in `masked_bytes`.
        unsafe { _mm256_add_epi16(partial, _mm256_maddubs_epi16(codes, _mm256_set1_epi32(x as i32))) }
    }

    #[inline(always)]
    fn close(self, sums: __m256i, partial: __m256i) -> __m256i {
        // SAFETY: as in `masked_bytes`.
        unsafe { _mm256_add_epi32(sums, _mm256_madd_epi16(partial, _mm256_set1_epi16(1))) }
    }

    #[inline(always)]
    fn multiply_bytes(self, sums: __m256i, bytes: __m256i, x: u32) -> __m256i {
        // SAFETY: as in `masked_bytes`.
        unsafe {
            let signed = _mm256_sign_epi8(_mm256_set1_epi32(x as i32), bytes);
            let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(bytes), signed);
            _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        }
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
