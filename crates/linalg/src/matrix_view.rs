use std::ops::Range;

use faer::{MatMut, MatRef};

/// The number types that products are made for: `f32` and `f64`.
pub trait Scalar: faer::traits::ComplexField + Copy {
    /// Additive identity.
    const ZERO: Self;
    /// Multiplicative identity.
    const ONE: Self;

    /// Half of it.
    #[must_use]
    fn halved(self) -> Self;

    /// The same number in f64.
    fn wide(self) -> f64;
}

impl Scalar for f32 {
    const ZERO: f32 = 0.0;
    const ONE: f32 = 1.0;

    fn halved(self) -> Self {
        self * 0.5
    }

    fn wide(self) -> f64 {
        f64::from(self)
    }
}

impl Scalar for f64 {
    const ZERO: f64 = 0.0;
    const ONE: f64 = 1.0;

    fn halved(self) -> Self {
        self * 0.5
    }

    fn wide(self) -> f64 {
        self
    }
}

/// A matrix over borrowed numbers; transposing and cutting cost nothing.
#[derive(Clone, Copy, Debug)]
pub struct MatrixView<'a, T: Scalar>(pub(crate) MatRef<'a, T>);

impl<'a, T: Scalar> MatrixView<'a, T> {
    /// A row-major `[rows, columns]` matrix.
    ///
    /// # Panics
    /// When the number of values is not `rows · columns`.
    pub fn new(values: &'a [T], rows: usize, columns: usize) -> Self {
        MatrixView(MatRef::from_row_major_slice(values, rows, columns))
    }

    /// Number of rows.
    pub fn rows(self) -> usize {
        self.0.nrows()
    }

    /// Number of columns.
    pub fn columns(self) -> usize {
        self.0.ncols()
    }

    /// The same numbers with rows and columns exchanged.
    #[must_use]
    pub fn transposed(self) -> Self {
        MatrixView(self.0.transpose())
    }

    /// Some consecutive rows.
    #[must_use]
    pub fn row_range(self, range: Range<usize>) -> Self {
        MatrixView(self.0.subrows(range.start, range.len()))
    }

    /// Some consecutive columns.
    #[must_use]
    pub fn column_range(self, range: Range<usize>) -> Self {
        MatrixView(self.0.subcols(range.start, range.len()))
    }
}

/// A matrix that is written to.
#[derive(Debug)]
pub struct MatrixViewMut<'a, T: Scalar>(pub(crate) MatMut<'a, T>);

impl<'a, T: Scalar> MatrixViewMut<'a, T> {
    /// A row-major `[rows, columns]` matrix.
    ///
    /// # Panics
    /// When the number of values is not `rows · columns`.
    pub fn new(values: &'a mut [T], rows: usize, columns: usize) -> Self {
        MatrixViewMut(MatMut::from_row_major_slice_mut(values, rows, columns))
    }

    /// Some consecutive columns.
    #[must_use]
    pub fn column_range(self, range: Range<usize>) -> Self {
        MatrixViewMut(self.0.subcols_mut(range.start, range.len()))
    }
}
