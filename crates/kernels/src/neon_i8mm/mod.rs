//! NEON with the products of unsigned and signed bytes that ARMv8.6 brought.

mod integer;
mod integer_strip;
mod table;

pub(crate) use table::TABLE;
