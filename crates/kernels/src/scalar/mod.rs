//! Portable Rust, in a shape that compilers vectorize for the baseline of the target.

mod integer;
mod table;
mod vector;

pub(crate) use table::TABLE;
#[cfg(test)]
pub(crate) use vector::Scalar;
