//! What the tests of kernels go through: every level, or the one that they are told to.

use kintsugi_kernels::Kernels;
use kintsugi_runtime::{CpuFeatures, CpuLevel};

/// Every level of this machine, lowest first; where `KINTSUGI_CPU` forces one, that one: emulated CPUs are too slow to
/// repeat what real ones have done.
pub(crate) fn every_level() -> Vec<CpuLevel> {
    let selected = CpuLevel::selected().unwrap();
    let forced = std::env::var_os("KINTSUGI_CPU").is_some_and(|name| !name.is_empty());
    CpuLevel::available().filter(|&level| !forced || level == selected).collect()
}

/// Those of every level, and once more with products in bf16 where they are not the choice.
pub(crate) fn every_kernels() -> Vec<Kernels> {
    let mut kernels: Vec<Kernels> = every_level().into_iter().map(|level| Kernels::new(level).unwrap()).collect();
    let features = CpuFeatures::detect();
    if features.avx512_bf16 && !features.fast_bf16 && kernels.last().unwrap().level() == CpuLevel::Avx512Vnni {
        kernels.push(Kernels::new(CpuLevel::Avx512Vnni).unwrap().with_bf16());
    }
    kernels
}
