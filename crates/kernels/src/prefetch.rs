/// How a level asks for the codes that come next. The prefetchers of a CPU stop at the end of a page and start anew after
/// it; a panel goes on.
#[derive(Clone, Copy)]
pub(crate) struct Prefetch {
    /// How far ahead, in bytes.
    pub(crate) distance: usize,
    /// Into which cache.
    pub(crate) cache: Cache,
}

/// A cache of a core.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cache {
    First,
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "a choice of AVX-512"))]
    Second,
}

/// Bytes of a line of the cache.
const LINE: usize = 64;

impl Prefetch {
    /// Asks for what comes after these `bytes` at the distance. It need not exist.
    #[inline(always)]
    pub(crate) fn ahead_of(self, codes: *const u8, bytes: usize) {
        let address = codes.wrapping_add(self.distance);
        match self.cache {
            Cache::First => prefetch::<true>(address, bytes),
            Cache::Second => prefetch::<false>(address, bytes),
        }
    }
}

/// Asks for some bytes, whole lines of them, in the first cache or at least the second. They need not exist.
#[inline(always)]
pub(crate) fn prefetch<const FIRST: bool>(address: *const u8, bytes: usize) {
    for line in 0..bytes.div_ceil(LINE) {
        let address = address.wrapping_add(line * LINE);
        #[cfg(target_arch = "x86_64")]
        // SAFETY: every x86-64 CPU has the instruction, and it never faults.
        unsafe {
            use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
            if FIRST {
                _mm_prefetch::<_MM_HINT_T0>(address.cast());
            } else {
                _mm_prefetch::<_MM_HINT_T1>(address.cast());
            }
        }
        // Elsewhere the instruction is not in Rust yet, and what it would bring has not been measured.
        #[cfg(not(target_arch = "x86_64"))]
        let _ = address;
    }
}
