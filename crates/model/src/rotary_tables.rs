use kintsugi_kernels::RotaryTable;
use kintsugi_runtime::Result;

use crate::{Backend, Batch, DecoderSpec, RotarySpec};

/// The cosines and sines of the rows of one batch, which all blocks share.
pub struct RotaryTables<B: Backend> {
    /// `None` where positions are learned.
    table: Option<B::Rotary>,
    window_table: Option<B::Rotary>,
}

impl<B: Backend> RotaryTables<B> {
    /// The tables for the positions of `batch`.
    ///
    /// # Errors
    /// What the backend reports.
    pub fn new(backend: &B, spec: &DecoderSpec, batch: &Batch) -> Result<Self> {
        let prepare = |rotary: &Option<RotarySpec>| -> Result<Option<B::Rotary>> {
            rotary.as_ref().map(|rotary| backend.prepare_rotary(table(rotary, batch))).transpose()
        };
        Ok(RotaryTables { table: prepare(&spec.rotary)?, window_table: prepare(&spec.window_rotary)? })
    }

    /// The table of a block, by whether it attends to a window.
    pub(crate) fn of(&self, window: bool) -> Option<&B::Rotary> {
        self.window_table.as_ref().filter(|_| window).or(self.table.as_ref())
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
