//! AVX2, FMA and F16C, with the int8 products of AVX-VNNI.

mod integer;
mod table;

pub(crate) use table::TABLE;
