//! Low-rank compensation of a compression residual: EoRA.
