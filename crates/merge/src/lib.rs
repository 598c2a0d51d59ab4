//! Merging low-rank adapters, Linear by Linear.
//!
//! Input are the factors that several adapters have for one Linear, each with its scaling and the weight that the user
//! gives it; output are the factors of one adapter with scaling 1, and what the merge has kept of every source. Knows
//! no files and no models.
//!
//! Nothing depends on the order of the adapters: they are sorted by their content first. Every sum is f64 in an order
//! that the shapes fix, so that threads change no bit. No method ever holds a dense update per adapter.

mod cat;
mod elementwise;
mod factor_update;
mod gauge_free_lego;
mod iso_c;
mod join;
mod lego;
mod linear;
mod linear_sources;
mod merge_linear;
mod merge_method;
mod merge_options;
mod merge_report;
mod metric_weights;
mod side_basis;
mod spectrum;
mod stored_cat;
mod svd;
mod tsv;
mod unit_stack;
mod weighted_units;

pub use cat::Cat;
pub use elementwise::{DARE_LINEAR, DARE_TIES, Elementwise, KNOTS, MAGNITUDE_PRUNE, TIES};
pub use factor_update::FactorUpdate;
pub use gauge_free_lego::GaugeFreeLego;
pub use iso_c::IsoC;
pub use join::join;
pub use lego::Lego;
pub use linear::Linear;
pub use linear_sources::{LinearSources, MergeSource};
pub use merge_linear::{MergedLinear, merge_linear};
pub use merge_method::{METHODS, MergeMethod, Solution, check_statistics, merge_method};
pub use merge_options::{Coordinates, Gauge, MOST_RANK, MergeOptions, RankRule, ScaleRule, SignElection};
pub use merge_report::{LinearMergeReport, Overlap, SourceShare, sum_norms};
pub use metric_weights::{MetricFormula, metric_weights};
pub use stored_cat::{StoredCat, StoredSource};
pub use svd::Svd;
pub use tsv::Tsv;
pub use unit_stack::UnitStack;
