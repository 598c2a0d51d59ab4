//! One file per layout of quantized Linears; [`crate::FORMATS`] is the table.

mod awq;
mod compressed_tensors;
mod gptq;
mod int_quantized;
mod pack_quantized;

pub use awq::Awq;
pub use gptq::Gptq;
pub use int_quantized::IntQuantized;
pub use pack_quantized::PackQuantized;

use kintsugi_runtime::{Error, ErrorCode, Result};
use kintsugi_weights::{QuantizedMatrix, QuantizedParts};

use crate::LinearTensors;

/// Joins what was read of a Linear.
///
/// # Errors
/// `ERR_CHECKPOINT_CORRUPT` when the parts do not fit together.
fn assemble(linear: &LinearTensors<'_>, parts: QuantizedParts) -> Result<QuantizedMatrix> {
    QuantizedMatrix::new(parts).map_err(|error| {
        Error::new(ErrorCode::CheckpointCorrupt, error.message)
            .subject(linear.name())
            .hint("The tensors of this Linear do not fit together; download the checkpoint again")
    })
}
