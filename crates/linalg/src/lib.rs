//! Dense linear algebra on faer: products, Cholesky with repair, QR, symmetric eigenproblems, singular values, k-means.
//!
//! Matrices are row-major slices at the border. faer runs sequentially inside tasks whose shapes depend on the
//! matrices alone, so a result is the same, bit for bit, whatever the number of threads.

mod block_krylov;
mod block_product;
mod cholesky_solve;
mod column_products;
mod kernel_k_means;
mod leading_directions;
mod matrix_view;
mod product;
mod row_products;
mod split_mix;
mod symmetric_eigen;
mod symmetric_solve;
mod thin_qr;
mod thin_svd;
mod transposed;
mod triangular;
mod upper_cholesky;
mod upper_triangle;

pub use block_krylov::{BlockKrylov, SymmetricOperator};
pub use column_products::{product_by_columns, times_symmetric_by_columns};
pub use kernel_k_means::{KMeansOptions, KernelKMeans};
pub use leading_directions::{BalancedFactors, LeadingDirections};
pub use matrix_view::{MatrixView, MatrixViewMut, Scalar};
pub use product::{
    accumulate_cross, accumulate_gram, add_product, product, quadratic_forms, quadratic_trace, quadratic_trace_of,
    subtract_product, symmetric_product, times_symmetric,
};
pub use row_products::{combine_rows, row_gram, row_products};
pub use split_mix::SplitMix64;
pub use symmetric_eigen::SymmetricEigen;
pub use symmetric_solve::solve_symmetric;
pub use thin_qr::ThinQr;
pub use thin_svd::ThinSvd;
pub use transposed::transposed;
pub use triangular::solve_transposed_upper;
pub use upper_cholesky::UpperCholesky;
pub use upper_triangle::UpperTriangle;
