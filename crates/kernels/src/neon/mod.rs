//! NEON as ARMv8.0 has it.

mod byte_products;
mod integer;
mod table;
mod vector;

pub(crate) use byte_products::ByteProducts;
pub(crate) use table::TABLE;
pub(crate) use vector::Neon;
