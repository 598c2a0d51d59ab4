use std::arch::asm;

use kintsugi_runtime::CpuLevel;

use super::ArithmeticCeiling;
use super::ceilings::{F32_FACTORS, INDEPENDENT, INT8_FACTORS, TURNS};
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

const BYTES: [[i8; 16]; 2] = [[INT8_FACTORS.0; 16], [INT8_FACTORS.1; 16]];
static FLOATS: [[f32; 4]; 2] = [[F32_FACTORS.0; 4], [F32_FACTORS.1; 4]];

/// A loop of an instruction that adds products of `v24` and `v25` to each of `v0` to `v23`, one after another. In assembly
/// as a whole: a compiler would multiply once and only add in the loop, and not all of these are intrinsics yet.
macro_rules! sums {
    ($name:ident, $features:literal, $factors:ident, [$zero:literal; $lanes:literal], $mnemonic:literal, $operands:literal) => {
        sums! {
            $name, $features, $factors, [$zero; $lanes], $mnemonic, $operands,
            0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23
        }
    };
    (
        $name:ident, $features:literal, $factors:ident, [$zero:literal; $lanes:literal],
        $mnemonic:literal, $operands:literal, $($register:literal)+
    ) => {
        #[target_feature(enable = $features)]
        fn $name() -> f64 {
            const { assert!(INDEPENDENT == [$($register),+].len()) };
            let mut sums = [[$zero; $lanes]; INDEPENDENT];
            // SAFETY: the instruction is there as the target feature says. Reads the two registers of `$factors`, writes the
            // registers of `sums`, which has as many, and touches no other memory.
            unsafe {
                asm!(
                    "ld1 {{v24.16b, v25.16b}}, [x2]",
                    $(concat!("movi v", $register, ".2d, #0"),)+
                    "2:",
                    $(concat!($mnemonic, " v", $register, $operands),)+
                    "subs x1, x1, #1",
                    "b.ne 2b",
                    $(concat!("str q", $register, ", [x0], #16"),)+
                    inout("x0") sums.as_mut_ptr() => _,
                    inout("x1") TURNS => _,
                    in("x2") $factors.as_ptr(),
                    clobber_abi("C"),
                    options(nostack),
                );
            }
            sums.into_iter().flatten().map(f64::from).sum()
        }
    };
}

sums!(smlal, "neon", BYTES, [0i16; 8], "smlal", ".8h, v24.8b, v25.8b");
sums!(sdot, "neon,dotprod", BYTES, [0i32; 4], "sdot", ".4s, v24.16b, v25.16b");
sums!(usmmla, "neon,i8mm", BYTES, [0i32; 4], "usmmla", ".4s, v24.16b, v25.16b");
sums!(fmla, "neon", FLOATS, [0f32; 4], "fmla", ".4s, v24.4s, v25.4s");
