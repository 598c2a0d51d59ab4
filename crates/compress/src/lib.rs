//! Solvers that turn a weight and its calibration statistics into a quantized weight: RTN, GPTQ.

mod gptq;
mod gptq_sweep;
mod grid;
mod linear_method;
mod quantize_options;
mod rtn;

pub use gptq::{Gptq, GptqSolution, gptq};
pub use grid::{Grid, GridRule};
pub use linear_method::{LinearMethod, METHODS, linear_method};
pub use quantize_options::QuantizeOptions;
pub use rtn::{Rtn, rtn};
