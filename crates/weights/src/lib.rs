//! Every form that a weight can take, the number formats behind it, and the scalar reference product.
//!
//! Pure: no files, no threads, no SIMD. Matrices are row-major `[rows, columns]`, where a row is an output of the
//! Linear (`y = W x + b`, W is `[outFeatures, inFeatures]`).

mod adapter;
mod bit_packing;
mod code_table;
mod dense_matrix;
mod element_type;
mod factor_bias;
mod linear_weight;
mod low_rank;
mod quantized_matrix;
mod reference_product;
mod row_source;
mod stacked_rows;
mod stored_rows;

pub use adapter::{Adapter, AdapterEntry};
pub use bit_packing::{pack_codes, packed_words, unpack_codes};
pub use code_table::CodeTable;
pub use dense_matrix::{DenseMatrix, DenseValues};
pub use element_type::ElementType;
pub use factor_bias::FactorBias;
pub use linear_weight::{LinearWeight, WeightMatrix};
pub use low_rank::{FactorCodes, LowRank};
pub use quantized_matrix::{CODE_BITS, GroupAxis, GroupSize, QuantizedMatrix, QuantizedParts};
pub use reference_product::reference_product;
pub use row_source::RowSource;
pub use stacked_rows::StackedRows;
pub use stored_rows::StoredRows;
