//! Low-rank compensation of a compression residual: EoRA.

mod eora;
mod residual_error;

pub use eora::{Compensation, EoraOptions, eora};
pub use residual_error::{ResidualError, output_energy, residual_error};
