use kintsugi_kernels::RotaryTable;
use kintsugi_runtime::Result;

use crate::{Backend, Batch, DecoderSpec, RotarySpec};

/// The cosines and sines of the rows of one batch, which all blocks share.
pub struct RotaryTables<B: Backend> {
    pub(crate) table: B::Rotary,
}

impl<B: Backend> RotaryTables<B> {
    /// The tables for the positions of `batch`.
    ///
    /// # Errors
    /// What the backend reports.
    pub fn new(backend: &B, spec: &DecoderSpec, batch: &Batch) -> Result<Self> {
        Ok(RotaryTables { table: backend.prepare_rotary(table(&spec.rotary, batch))? })
    }
}

fn table(rotary: &RotarySpec, batch: &Batch) -> RotaryTable {
    let mut table = RotaryTable::new(rotary.pairs());
    for segment in batch.segments() {
        let frequencies = rotary.frequencies(segment.sequence_length);
        for &position in &batch.positions()[segment.rows.clone()] {
            table.push(position, &frequencies, rotary.scale());
        }
    }
    table
}
