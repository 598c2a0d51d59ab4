use kintsugi_runtime::Result;

use crate::{DenseMatrix, ElementType};

/// A matrix of floats whose rows are read when they are asked for, in the type that they are stored in.
pub trait StoredRows: Sync {
    /// Number of rows.
    fn rows(&self) -> usize;

    /// Number of columns.
    fn columns(&self) -> usize;

    /// The type of the values.
    fn element_type(&self) -> ElementType;

    /// Fills `bytes` with as many whole rows as it has room for, from row `first` on. All values are finite.
    ///
    /// # Errors
    /// What reading reports; an error of its own for values that are NaN or infinite.
    fn read_rows(&self, first: usize, bytes: &mut [u8]) -> Result<()>;
}

impl StoredRows for DenseMatrix {
    fn rows(&self) -> usize {
        self.rows()
    }

    fn columns(&self) -> usize {
        self.columns()
    }

    fn element_type(&self) -> ElementType {
        self.element_type()
    }

    fn read_rows(&self, first: usize, bytes: &mut [u8]) -> Result<()> {
        let start = first * self.columns() * self.element_type().bits() / 8;
        bytes.copy_from_slice(&self.bytes()[start..start + bytes.len()]);
        Ok(())
    }
}
