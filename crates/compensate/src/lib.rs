//! Low-rank compensation of a compression residual: EoRA.

mod affine;
mod certificate;
mod compensation;
mod compensation_method;
mod diagonal;
mod exact;
mod factor_precision;
mod factor_storage;
mod fast;
mod hold_out;
mod input_metric;
mod lorc;
mod output_directions;
mod output_energies;
mod rank_allocation;
mod rank_profile;
mod residual;
mod residual_error;

pub use certificate::Certificate;
pub use compensation::{Compensation, CompensationOptions, compensate};
pub use compensation_method::{CompensationMethod, METHODS, compensation_method};
pub use diagonal::Diagonal;
pub use exact::Exact;
pub use factor_precision::FactorPrecision;
pub use factor_storage::FactorStorage;
pub use fast::{Fast, directions_bytes};
pub use hold_out::HoldOut;
pub use lorc::Lorc;
pub use output_directions::OutputDirections;
pub use rank_allocation::{RankBudget, RankCandidate, RankLimits, allocate_ranks};
pub use rank_profile::{HoldOutError, HoldOutProfile, RankProfile};
pub use residual::Residual;
pub use residual_error::{ResidualError, output_energy, residual_error};
