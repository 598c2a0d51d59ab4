//! AVX2, FMA and F16C.

mod integer;
mod table;
mod vector;

pub(crate) use table::TABLE;
pub(crate) use vector::Avx2;
