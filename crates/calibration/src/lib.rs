//! Streamed second moments of the input of a Linear: what the solvers know about its activations.

mod calibration;
mod calibration_builder;
mod centring;
mod drift;
mod drift_builder;

pub use calibration::{Calibration, SumPart};
pub use calibration_builder::{CHUNK_TOKENS, CalibrationBuilder};
pub use drift::Drift;
pub use drift_builder::DriftBuilder;
