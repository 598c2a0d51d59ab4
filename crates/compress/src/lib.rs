//! Solvers that turn a weight and its calibration statistics into a quantized weight: RTN, GPTQ, AWQ, each with groups
//! along the inputs, the outputs or the better of the two (AdaDim).

mod adaptive_axis;
mod awq;
mod block_method;
mod gptq;
mod gptq_sweep;
mod grid;
mod linear_method;
mod quantize_options;
mod rtn;

pub use awq::{Awq, awq_scales, scale_columns};
pub use block_method::{BLOCK_METHODS, BlockLoss, BlockMethod, GroupScales, ScaleGroup, block_method};
pub use gptq::{Gptq, GptqSolution, gptq, tile_rows};
pub use grid::{Grid, GridRule, GroupInputs};
pub use linear_method::{LinearMethod, METHODS, linear_method};
pub use quantize_options::{AxisRule, Clip, QuantizeOptions};
pub use rtn::{Rtn, rtn};
