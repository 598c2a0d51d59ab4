//! AVX-512 F, BW, VL, DQ and VNNI, with BF16 products where the CPU has them.

mod bf16_codec;
mod bf16_strip;
mod integer;
mod table;
mod vector;

pub(crate) use table::TABLE;
