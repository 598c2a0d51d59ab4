//! Case tables with error budgets, f64 oracles, generators of realistic and hostile matrices (tests only).

pub mod eora_cases;
pub mod float8_checkpoint;
mod int8_activations;
pub mod kernel_cases;
pub mod matrices;
pub mod outlier_checkpoint;
mod random;
pub mod reference_rows;
pub mod synthetic_checkpoint;

pub use int8_activations::{Int8Activations, with_int8_projection};
pub use random::Random;
