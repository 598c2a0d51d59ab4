use std::arch::aarch64::*;
use std::arch::asm;

use crate::neon::ByteProducts;

/// Products of int8 by FEAT_I8MM: unsigned bytes are multiplied with signed ones and four neighbours added in 32 bits
/// (`usdot`).
#[derive(Clone, Copy)]
pub(crate) struct I8mm;

impl ByteProducts for I8mm {
    type Partial = int32x4_t;
    // Four products are added to a lane at a time.
    const RUN_LIMIT: usize = i32::MAX as usize / (4 * 127);
    // A product takes three cycles, and up to four start in each.
    const SUMS_UNDER_WAY: usize = 12;
    const SIGNED: bool = false;

    #[inline(always)]
    unsafe fn open(sums: int32x4_t) -> int32x4_t {
        sums
    }

    #[inline(always)]
    unsafe fn multiply_fields(partial: int32x4_t, codes: uint8x16_t, x: u32) -> int32x4_t {
        // SAFETY: as the caller promises.
        unsafe { usdot(partial, codes, x) }
    }

    #[inline(always)]
    unsafe fn close(_: int32x4_t, partial: int32x4_t) -> int32x4_t {
        partial
    }

    #[inline(always)]
    unsafe fn multiply_bytes(sums: int32x4_t, bytes: uint8x16_t, x: u32) -> int32x4_t {
        // SAFETY: as the caller promises.
        unsafe { usdot(sums, bytes, x) }
    }
}

/// To each lane the products of its four unsigned bytes with the signed bytes of `x`. The intrinsic is not in Rust yet.
#[inline]
#[target_feature(enable = "i8mm")]
fn usdot(mut sums: int32x4_t, bytes: uint8x16_t, x: u32) -> int32x4_t {
    // SAFETY: the instruction is there as the target feature says, and touches registers alone.
    unsafe {
        asm!(
            "usdot {sums:v}.4s, {bytes:v}.16b, {x:v}.4b[0]",
            sums = inout(vreg) sums,
            bytes = in(vreg) bytes,
            // A float, because those are loaded into the registers that the instruction reads.
            x = in(vreg) f32::from_bits(x),
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sums
}
