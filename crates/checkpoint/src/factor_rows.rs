use kintsugi_runtime::Result;
use kintsugi_weights::{ElementType, StoredRows};

use crate::adapter_folder::as_adapter_error;
use crate::safetensors_file::{SafetensorsFile, StoredTensor, not_finite};

/// A factor of an adapter that stays in its file; rows are read when they are asked for.
#[derive(Debug)]
pub struct FactorRows<'a> {
    pub(crate) name: &'a str,
    pub(crate) file: &'a SafetensorsFile,
    pub(crate) tensor: &'a StoredTensor,
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) element_type: ElementType,
}

impl StoredRows for FactorRows<'_> {
    fn rows(&self) -> usize {
        self.rows
    }

    fn columns(&self) -> usize {
        self.columns
    }

    fn element_type(&self) -> ElementType {
        self.element_type
    }

    /// # Errors
    /// `ERR_ADAPTER_INVALID` when the file is damaged or holds NaN or infinite values, `ERR_IO`.
    fn read_rows(&self, first: usize, bytes: &mut [u8]) -> Result<()> {
        let start = (first * self.columns * self.element_type.bits() / 8) as u64;
        self.file.read_part(self.tensor, start, bytes).map_err(as_adapter_error)?;
        match self.element_type.first_not_finite(bytes) {
            Some(position) => {
                let (row, column) = (first + position / self.columns, position % self.columns);
                Err(as_adapter_error(not_finite(self.name, &format!("row {row}, column {column}"))))
            }
            None => Ok(()),
        }
    }
}
