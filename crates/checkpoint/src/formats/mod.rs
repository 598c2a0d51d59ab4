//! One file per layout of quantized Linears; [`crate::FORMATS`] is the table.

mod awq;
mod bits_and_bytes;
mod compressed_tensors;
mod float4;
mod gptq;
mod int_quantized;
mod kintsugi;
mod pack_quantized;
mod packed_codes;

pub use awq::Awq;
pub use bits_and_bytes::BitsAndBytes;
pub use float4::Float4;
pub use gptq::Gptq;
pub use int_quantized::IntQuantized;
pub use kintsugi::Kintsugi;
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

/// The two codes of each byte.
fn nibbles(bytes: &[u8], high_first: bool) -> Vec<u8> {
    let pair = |byte: &u8| if high_first { [byte >> 4, byte & 15] } else { [byte & 15, byte >> 4] };
    bytes.iter().flat_map(pair).collect()
}

/// That a format is not written.
fn read_only(format: &str) -> Error {
    Error::new(ErrorCode::QuantizationUnsupported, format!("the format {format} is read, not written"))
        .subject("format")
        .hint("Write compressed-tensors/pack-quantized")
}
