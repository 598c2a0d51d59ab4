//! Dense linear algebra on faer: products, Cholesky with repair, QR, symmetric eigenproblems.
//!
//! Matrices are row-major slices at the border. faer runs sequentially inside tasks whose shapes depend on the
//! matrices alone, so a result is the same, bit for bit, whatever the number of threads.

mod matrix_view;
mod product;
mod symmetric_eigen;
mod thin_qr;
mod upper_cholesky;

pub use matrix_view::{MatrixView, MatrixViewMut, Scalar};
pub use product::{accumulate_gram, add_product, mirror_upper_triangle, product, quadratic_trace, symmetric_product};
pub use symmetric_eigen::SymmetricEigen;
pub use thin_qr::ThinQr;
pub use upper_cholesky::UpperCholesky;
