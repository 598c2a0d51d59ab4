//! How fast this machine reads and multiplies, and how much of that the products reach.

mod ceilings;
mod matrix_rotation;
mod measurement;
#[cfg(target_arch = "aarch64")]
mod neon_loops;
mod pace;
mod rounds;
mod speed_report;
mod spread;
mod weight_kind;
#[cfg(target_arch = "x86_64")]
mod x86_loops;

pub use ceilings::{ArithmeticCeiling, ReadingCeiling};
pub use matrix_rotation::MatrixRotation;
pub use measurement::{SpeedOptions, measure_speed};
pub use speed_report::{CeilingSpeed, ModelSpeed, ProductLimit, ProductSpeed, SpeedReport};
pub use spread::Spread;
