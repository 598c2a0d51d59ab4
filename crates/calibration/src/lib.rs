//! Streamed second moments of the input of a Linear: what the solvers know about its activations.

mod calibration;
mod calibration_builder;
mod centring;

pub use calibration::{Calibration, SumPart};
pub use calibration_builder::{CHUNK_TOKENS, CalibrationBuilder};
