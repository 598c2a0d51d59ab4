use std::sync::OnceLock;

use crate::{Error, ErrorCode, Result};

/// What the instruction set of a kernel is called; those of one architecture in the order of speed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum CpuLevel {
    /// Portable Rust, vectorized by the compiler for the baseline of the target.
    Scalar,
    /// AVX2, FMA and F16C (x86-64-v3).
    Avx2,
    /// The same with AVX-VNNI: CPUs that multiply int8 in one instruction and have no AVX-512.
    AvxVnni,
    /// AVX-512 F, BW, VL, DQ and VNNI; BF16 products where the CPU has them.
    Avx512Vnni,
    /// NEON as every 64-bit ARM CPU has it.
    Neon,
    /// The same with dot products of bytes (FEAT_DotProd).
    NeonDotprod,
    /// The same with products of unsigned and signed bytes, and of matrices of them (FEAT_I8MM).
    NeonI8mm,
}

/// Optional features beyond the level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuFeatures {
    /// `vdpbf16ps`: two bf16 products per lane in one instruction.
    pub avx512_bf16: bool,
    /// Whether that is quicker than two products in f32. Measured with loops of either: on Zen 4 it is twice as quick, on
    /// Sapphire Rapids half. Other CPUs of each vendor are taken to be alike.
    pub fast_bf16: bool,
}

impl CpuLevel {
    /// Every level, lowest first.
    pub const ALL: [CpuLevel; 7] = [
        CpuLevel::Scalar,
        CpuLevel::Avx2,
        CpuLevel::AvxVnni,
        CpuLevel::Avx512Vnni,
        CpuLevel::Neon,
        CpuLevel::NeonDotprod,
        CpuLevel::NeonI8mm,
    ];

    /// The name that `KINTSUGI_CPU` takes and `doctor` prints.
    pub const fn name(self) -> &'static str {
        match self {
            CpuLevel::Scalar => "scalar",
            CpuLevel::Avx2 => "avx2",
            CpuLevel::AvxVnni => "avxvnni",
            CpuLevel::Avx512Vnni => "avx512vnni",
            CpuLevel::Neon => "neon",
            CpuLevel::NeonDotprod => "neon-dotprod",
            CpuLevel::NeonI8mm => "neon-i8mm",
        }
    }

    /// The level of that name.
    pub fn from_name(name: &str) -> Option<CpuLevel> {
        Self::ALL.into_iter().find(|level| level.name() == name)
    }

    /// Whether this machine can run the level.
    pub fn is_available(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            let avx2 = || has!("avx2") && has!("fma") && has!("f16c");
            let avx512 = || has!("avx512f") && has!("avx512bw") && has!("avx512vl") && has!("avx512dq");
            match self {
                CpuLevel::Scalar => true,
                CpuLevel::Avx2 => avx2(),
                CpuLevel::AvxVnni => avx2() && has!("avxvnni"),
                CpuLevel::Avx512Vnni => avx2() && avx512() && has!("avx512vnni"),
                CpuLevel::Neon | CpuLevel::NeonDotprod | CpuLevel::NeonI8mm => false,
            }
        }
        #[cfg(target_arch = "aarch64")]
        {
            use std::arch::is_aarch64_feature_detected as has;
            // Kernels take words from memory as they lie there, and codes are little-endian.
            let neon = || cfg!(target_endian = "little") && has!("neon");
            match self {
                CpuLevel::Scalar => true,
                CpuLevel::Avx2 | CpuLevel::AvxVnni | CpuLevel::Avx512Vnni => false,
                CpuLevel::Neon => neon(),
                CpuLevel::NeonDotprod => neon() && has!("dotprod"),
                CpuLevel::NeonI8mm => neon() && has!("dotprod") && has!("i8mm"),
            }
        }
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        {
            self == CpuLevel::Scalar
        }
    }

    /// Every level that this machine can run, lowest first.
    pub fn available() -> impl Iterator<Item = CpuLevel> {
        Self::ALL.into_iter().filter(|level| level.is_available())
    }

    /// The highest level that this machine can run.
    pub fn best() -> CpuLevel {
        static BEST: OnceLock<CpuLevel> = OnceLock::new();
        *BEST.get_or_init(|| Self::available().last().unwrap_or(CpuLevel::Scalar))
    }

    /// The level that products use: the one that `KINTSUGI_CPU` forces, else the best.
    ///
    /// # Errors
    /// `ERR_CPU_LEVEL` when `KINTSUGI_CPU` names no level or one that this machine lacks.
    pub fn selected() -> Result<CpuLevel> {
        static SELECTED: OnceLock<Result<CpuLevel>> = OnceLock::new();
        SELECTED
            .get_or_init(|| match std::env::var("KINTSUGI_CPU") {
                Ok(name) if !name.trim().is_empty() => Self::forced(name.trim()),
                _ => Ok(Self::best()),
            })
            .clone()
    }

    fn forced(name: &str) -> Result<CpuLevel> {
        let names = Self::ALL.map(CpuLevel::name).join(", ");
        let level = Self::from_name(name).ok_or_else(|| {
            Error::new(ErrorCode::CpuLevel, format!("KINTSUGI_CPU is '{name}', which is not a CPU level"))
                .subject("KINTSUGI_CPU")
                .hint(format!("Use one of {names}, or unset it"))
        })?;
        if !level.is_available() {
            return Err(Error::new(ErrorCode::CpuLevel, format!("this CPU cannot run level '{name}'"))
                .subject("KINTSUGI_CPU")
                .hint(format!("Its best level is '{}'", Self::best().name())));
        }
        Ok(level)
    }
}

impl CpuFeatures {
    /// What this machine has.
    pub fn detect() -> CpuFeatures {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::x86_64::__cpuid;
            let avx512_bf16 = std::arch::is_x86_feature_detected!("avx512bf16");
            let vendor = __cpuid(0);
            let vendor = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes);
            CpuFeatures { avx512_bf16, fast_bf16: avx512_bf16 && vendor.as_flattened() == b"AuthenticAMD" }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            CpuFeatures { avx512_bf16: false, fast_bf16: false }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_wrong_ones_are_refused() {
        for level in CpuLevel::ALL {
            assert_eq!(CpuLevel::from_name(level.name()), Some(level));
        }
        let error = CpuLevel::forced("sse9").unwrap_err();
        assert_eq!(error.code, ErrorCode::CpuLevel);
        assert!(error.hint.contains("avx2"));
        assert!(CpuLevel::available().any(|level| level == CpuLevel::Scalar));
    }

    /// `KINTSUGI_BEST_LEVEL` says what emulated CPUs should find; see `tools/test-aarch64.sh`.
    #[test]
    fn the_best_level_is_the_one_that_the_environment_expects() {
        if let Ok(expected) = std::env::var("KINTSUGI_BEST_LEVEL") {
            assert_eq!(CpuLevel::best().name(), expected);
            if std::env::var_os("KINTSUGI_CPU").is_none() {
                assert_eq!(CpuLevel::selected().unwrap().name(), expected);
            }
        }
    }

    #[test]
    fn a_level_comes_with_those_below_it() {
        use CpuLevel::{Avx2, Avx512Vnni, AvxVnni, Neon, NeonDotprod, NeonI8mm, Scalar};
        for (level, below) in [(AvxVnni, Avx2), (Avx512Vnni, Avx2), (NeonI8mm, NeonDotprod), (NeonDotprod, Neon)] {
            assert!(!level.is_available() || below.is_available(), "{} without {}", level.name(), below.name());
        }
        let portable = cfg!(not(any(target_arch = "x86_64", target_arch = "aarch64")));
        assert!(!portable || CpuLevel::best() == Scalar);
        assert!(cfg!(target_arch = "aarch64") || !Neon.is_available());
        assert!(cfg!(target_arch = "x86_64") || !Avx2.is_available());
    }
}
