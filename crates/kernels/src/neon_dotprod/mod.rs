//! NEON with the dot products of bytes that ARMv8.2 brought.

mod integer;
mod table;

pub(crate) use table::TABLE;
