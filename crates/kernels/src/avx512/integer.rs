use std::arch::x86_64::*;

use super::vector::Avx512;
use crate::integer_level::IntegerLevel;

/// AVX-512 VNNI multiplies unsigned bytes with signed ones and adds four neighbours in 32 bits (`vpdpbusd`).
impl IntegerLevel for Avx512 {
    type Codes = __m512i;
    type Partial = __m512i;
    type Sums = __m512i;
    type Floats = __m512;
    const ROWS: usize = 16;
    // Four products are added to a lane at a time.
    const RUN_LIMIT: usize = i32::MAX as usize / (4 * 127);
    // A product takes four or five cycles, and up to two start in each.
    const SUMS_UNDER_WAY: usize = 8;
    const BYTE_CENTRE: i32 = 128;

    #[inline(always)]
    unsafe fn load_codes(self, words: *const u8) -> __m512i {
        // SAFETY: the caller's pointer reaches a register.
        unsafe { _mm512_loadu_si512(words.cast()) }
    }

    #[inline(always)]
    unsafe fn store_codes(self, codes: __m512i, out: *mut u8) {
        // SAFETY: the caller's pointer has room for a register.
        unsafe { _mm512_storeu_si512(out.cast(), codes) }
    }

    #[inline(always)]
    fn masked_bytes(self, words: __m512i, shift: u32, mask: u8) -> __m512i {
        // SAFETY: `Avx512` exists only where the CPU has the instructions.
        unsafe {
            let shifted = _mm512_srl_epi16(words, _mm_cvtsi32_si128(shift as i32));
            _mm512_and_si512(shifted, _mm512_set1_epi8(mask as i8))
        }
    }

    #[inline(always)]
    fn or_bytes(self, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: as in `masked_bytes`.
        unsafe { _mm512_or_si512(a, b) }
    }

    #[inline(always)]
    fn bytes(self, words: __m512i) -> __m512i {
        words
    }

    /// The values plus 128, as unsigned bytes.
    #[inline(always)]
    fn byte_table(self, values: &[i8; 16]) -> __m512i {
        // SAFETY: as in `masked_bytes`; the array is as long as a quarter of a register.
        unsafe {
            let values = _mm512_broadcast_i32x4(_mm_loadu_si128(values.as_ptr().cast()));
            _mm512_xor_si512(values, _mm512_set1_epi8(i8::MIN))
        }
    }

    #[inline(always)]
    fn look_up(self, table: __m512i, fields: __m512i) -> __m512i {
        // SAFETY: as in `masked_bytes`.
        unsafe { _mm512_shuffle_epi8(table, fields) }
    }

    #[inline(always)]
    fn splat_sum(self, value: i32) -> __m512i {
        // SAFETY: as in `masked_bytes`.
        unsafe { _mm512_set1_epi32(value) }
    }

    #[inline(always)]
    fn add_sums(self, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: as in `masked_bytes`.
        unsafe { _mm512_add_epi32(a, b) }
    }

    #[inline(always)]
    fn open(self, sums: __m512i) -> __m512i {
        sums
    }

    #[inline(always)]
    fn multiply_fields(self, partial: __m512i, codes: __m512i, x: u32) -> __m512i {
        self.multiply_bytes(partial, codes, x)
    }

    #[inline(always)]
    fn close(self, _: __m512i, partial: __m512i) -> __m512i {
        partial
    }

    #[inline(always)]
    fn multiply_bytes(self, sums: __m512i, bytes: __m512i, x: u32) -> __m512i {
        // SAFETY: as in `masked_bytes`.
        unsafe { _mm512_dpbusd_epi32(sums, bytes, _mm512_set1_epi32(x as i32)) }
    }

    #[inline(always)]
    fn floats(self, sums: __m512i) -> __m512 {
        // SAFETY: as in `masked_bytes`.
        unsafe { _mm512_cvtepi32_ps(sums) }
    }

    #[inline(always)]
    unsafe fn subtract(self, values: __m512, zero_points: *const f32, x_sum: f32) -> __m512 {
        // SAFETY: as in `masked_bytes`; the caller's pointer reaches a register.
        unsafe { _mm512_fnmadd_ps(_mm512_loadu_ps(zero_points), _mm512_set1_ps(x_sum), values) }
    }

    #[inline(always)]
    unsafe fn add_scaled(self, values: __m512, scales: *const f32, x_scale: f32, totals: *mut f32) {
        // SAFETY: as in `masked_bytes`; the caller's pointers reach a register each.
        unsafe {
            let scales = _mm512_mul_ps(_mm512_loadu_ps(scales), _mm512_set1_ps(x_scale));
            _mm512_storeu_ps(totals, _mm512_fmadd_ps(values, scales, _mm512_loadu_ps(totals)));
        }
    }

    #[inline(always)]
    unsafe fn add_product(self, values: *const f32, factor: f32, totals: *mut f32) {
        // SAFETY: as in `masked_bytes`; the caller's pointers reach a register each.
        unsafe {
            let sum = _mm512_fmadd_ps(_mm512_loadu_ps(values), _mm512_set1_ps(factor), _mm512_loadu_ps(totals));
            _mm512_storeu_ps(totals, sum);
        }
    }
}
