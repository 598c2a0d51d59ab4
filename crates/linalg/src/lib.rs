//! Dense linear algebra on faer: products, Cholesky with repair, QR, symmetric eigenproblems.
//!
//! Matrices are row-major slices at the border. faer runs sequentially inside tasks whose shapes depend on the
//! matrices alone, so a result is the same, bit for bit, whatever the number of threads.

mod matrix_view;
mod product;
mod symmetric_eigen;
mod thin_qr;
mod upper_cholesky;
mod upper_triangle;

pub use matrix_view::{MatrixView, MatrixViewMut, Scalar};
pub use product::{
    accumulate_gram, add_product, product, quadratic_trace, quadratic_trace_of, subtract_product, symmetric_product,
    times_symmetric,
};
pub use symmetric_eigen::SymmetricEigen;
pub use thin_qr::ThinQr;
pub use upper_cholesky::UpperCholesky;
pub use upper_triangle::UpperTriangle;
