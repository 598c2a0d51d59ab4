/// How far ahead of the codes that are multiplied the next are asked for. The prefetchers of a CPU stop at the end of a
/// page and start anew after it; a panel goes on.
const DISTANCE: usize = 1024;

/// Bytes of a line of the cache.
const LINE: usize = 64;

/// Asks for the codes that come [`DISTANCE`] after these `bytes`. They need not exist.
#[inline(always)]
pub(crate) fn prefetch_ahead(codes: *const u8, bytes: usize) {
    prefetch(codes.wrapping_add(DISTANCE), bytes);
}

/// Asks for some bytes, whole lines of them, to be brought close. They need not exist.
#[inline(always)]
pub(crate) fn prefetch(address: *const u8, bytes: usize) {
    for line in 0..bytes.div_ceil(LINE) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: every x86-64 CPU has the instruction, and it never faults.
        unsafe {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            _mm_prefetch::<_MM_HINT_T0>(address.wrapping_add(line * LINE).cast());
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (address, line);
    }
}
