//! Solvers that turn a weight and its calibration statistics into a quantized weight: RTN, GPTQ.
