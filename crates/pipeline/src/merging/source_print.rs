use kintsugi_checkpoint::{AdapterFolder, WholeTensor};
use kintsugi_runtime::Result;
use kintsugi_weights::StoredRows;

/// Rows of a factor that a fingerprint looks at.
const ROWS: usize = 8;
/// Bytes of a tensor that is saved whole that a fingerprint looks at, in each of [`ROWS`] places.
const PIECE: u64 = 4096;

/// A hash (FNV-1a over 32-bit words) of what an adapter brings into a merge, module by module.
///
/// It looks at name, scaling, shapes and some rows of both factors of each module, and at pieces of the tensors that are
/// saved whole: training changes all of them, so that another state of the same adapter is told from it without a second
/// pass over its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SourcePrint(u64);

impl SourcePrint {
    /// Of no module.
    pub(crate) const fn new() -> Self {
        SourcePrint(0xcbf2_9ce4_8422_2325)
    }

    /// Of the factors A and B of one module.
    ///
    /// # Errors
    /// What reading reports.
    pub(crate) fn of_module(name: &str, scaling: f64, factors: [&dyn StoredRows; 2]) -> Result<Self> {
        let mut print = Self::new();
        name.bytes().for_each(|byte| print.add(u32::from(byte)));
        print.add_wide(scaling.to_bits());
        for factor in factors {
            print.add_wide(factor.rows() as u64);
            print.add_wide(factor.columns() as u64);
            let mut row = vec![0; factor.columns() * factor.element_type().bits() / 8];
            for i in 0..ROWS.min(factor.rows()) {
                factor.read_rows(i * factor.rows() / ROWS.min(factor.rows()), &mut row)?;
                factor.element_type().widen(&row).iter().for_each(|value| print.add(value.to_bits()));
            }
        }
        Ok(print)
    }

    /// Of a tensor that is saved whole: name, type, shape, and bytes from its start to its end.
    ///
    /// # Errors
    /// What reading reports.
    pub(crate) fn of_whole(folder: &AdapterFolder, tensor: &WholeTensor) -> Result<Self> {
        let mut print = Self::new();
        tensor.name.bytes().chain(tensor.element_type.name().bytes()).for_each(|byte| print.add(u32::from(byte)));
        tensor.shape.iter().for_each(|&size| print.add_wide(size as u64));
        let length = tensor.bytes.min(PIECE);
        let mut piece = vec![0; length as usize];
        let places = if tensor.bytes > PIECE { ROWS as u64 } else { length.min(1) };
        for i in 0..places {
            folder.read_whole(&tensor.name, (tensor.bytes - length) * i / (places - 1).max(1), &mut piece)?;
            piece.iter().for_each(|&byte| print.add(u32::from(byte)));
        }
        Ok(print)
    }

    /// With another module behind it.
    pub(crate) fn then(mut self, module: Self) -> Self {
        self.add_wide(module.0);
        self
    }

    fn add_wide(&mut self, word: u64) {
        self.add(word as u32);
        self.add((word >> 32) as u32);
    }

    fn add(&mut self, word: u32) {
        self.0 = (self.0 ^ u64::from(word)).wrapping_mul(0x0000_0100_0000_01b3);
    }
}

impl std::fmt::Display for SourcePrint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}
