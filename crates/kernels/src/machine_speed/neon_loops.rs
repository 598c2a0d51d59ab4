use std::arch::aarch64::*;
use std::arch::asm;
use std::hint::black_box;

use kintsugi_runtime::CpuLevel;

use super::ArithmeticCeiling;
use super::ceilings::{INDEPENDENT, TURNS};
use crate::Arithmetic;

/// The ceilings of a level that this CPU has; `None` where the portable ones are its own.
pub(super) fn arithmetic_ceilings(level: CpuLevel) -> Option<Vec<ArithmeticCeiling>> {
    assert!(level.is_available(), "loops run only with the instructions of this CPU");
    let new = ArithmeticCeiling::new;
    let int8 = match level {
        // SAFETY: the level has NEON.
        CpuLevel::Neon => new(Arithmetic::Int8, "smlal 8h", 16, || unsafe { smlal() }),
        // SAFETY: the level has NEON with dot products.
        CpuLevel::NeonDotprod => new(Arithmetic::Int8, "sdot 4s", 32, || unsafe { sdot() }),
        // SAFETY: the level has NEON with products of matrices of bytes.
        CpuLevel::NeonI8mm => new(Arithmetic::Int8, "usmmla 4s", 64, || unsafe { usmmla() }),
        _ => return None,
    };
    // SAFETY: all of these levels have NEON.
    Some(vec![int8, new(Arithmetic::F32, "fmla 4s", 8, || unsafe { fmla() })])
}

/// A loop of an instruction that adds products of bytes to a register. In assembly, because a compiler would multiply once
/// and only add in the loop, and because the intrinsics of some are not in Rust yet.
macro_rules! byte_products {
    ($name:ident, $features:literal, $zero:expr, $instruction:literal) => {
        #[target_feature(enable = $features)]
        fn $name() {
            let (a, b) = black_box((vdupq_n_s8(3), vdupq_n_s8(5)));
            let mut sums = [$zero; INDEPENDENT];
            for _ in 0..TURNS {
                for sum in &mut sums {
                    // SAFETY: the instruction is there as the target feature says, and touches registers alone.
                    unsafe {
                        asm!(
                            $instruction,
                            sum = inout(vreg) *sum,
                            a = in(vreg) a,
                            b = in(vreg) b,
                            options(pure, nomem, nostack, preserves_flags),
                        );
                    }
                }
            }
            black_box(sums);
        }
    };
}

byte_products!(smlal, "neon", vdupq_n_s16(0), "smlal {sum:v}.8h, {a:v}.8b, {b:v}.8b");
byte_products!(sdot, "neon,dotprod", vdupq_n_s32(0), "sdot {sum:v}.4s, {a:v}.16b, {b:v}.16b");
byte_products!(usmmla, "neon,i8mm", vdupq_n_s32(0), "usmmla {sum:v}.4s, {a:v}.16b, {b:v}.16b");

#[target_feature(enable = "neon")]
fn fmla() {
    let (a, b) = black_box((vdupq_n_f32(0.5), vdupq_n_f32(0.25)));
    let mut sums = [vdupq_n_f32(0.0); INDEPENDENT];
    for _ in 0..TURNS {
        for sum in &mut sums {
            *sum = vfmaq_f32(*sum, a, b);
        }
    }
    black_box(sums);
}
