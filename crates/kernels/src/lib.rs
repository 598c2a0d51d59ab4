//! CPU products chosen at run time, and the small operations of a decoder block.
//!
//! [`Kernels`] holds the functions of one CPU level. Operations are written once over `vector::Level`, the instructions
//! of a level, and compiled for each level as a whole; `scalar`, `avx2`, `avxvnni`, `avx512`, `neon`, `neon_dotprod` and
//! `neon_i8mm` supply the instructions, add what a single level can do (products in bf16, matrices of bytes), and
//! instantiate the table of functions. [`measure_speed`] compares products with what the machine can do.
#![allow(unsafe_code, reason = "instructions of a CPU level exist only as unsafe functions")]

mod accumulate;
mod activation;
mod aligned_bytes;
mod attention;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avxvnni;
mod code_fields;
mod codec;
mod grid_parameters;
mod integer_encoding;
mod integer_level;
mod integer_product;
mod integer_strip;
mod kernel_table;
mod kernels;
mod kv_pages;
mod late;
mod machine_speed;
#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(target_arch = "aarch64")]
mod neon_dotprod;
#[cfg(target_arch = "aarch64")]
mod neon_i8mm;
mod norm;
mod operands;
mod pack;
mod packed_input;
mod packed_low_rank;
mod packed_matrix;
mod prefetch;
mod product;
mod projection;
mod rotary_table;
mod scalar;
mod scratch_words;
mod self_check;
mod shared_rows;
mod strip;
mod tiled_input;
mod vector;

pub use activation::Activation;
pub use attention::Scores;
pub use kernels::{Kernels, Precision};
pub use kv_pages::{AttentionSegment, KvPages, PAGE_POSITIONS};
pub use machine_speed::{
    ArithmeticCeiling, CeilingSpeed, MatrixRotation, ModelSpeed, ProductLimit, ProductSpeed, ReadingCeiling,
    SpeedOptions, SpeedReport, Spread, measure_speed,
};
pub use packed_low_rank::PackedLowRank;
pub use packed_matrix::{Arithmetic, PackedMatrix};
pub use rotary_table::RotaryTable;
pub use self_check::{SelfCheck, self_check};
