use kintsugi_compensate::ResidualError;
use kintsugi_weights::GroupAxis;
use serde::{Deserialize, Serialize};

use crate::Recipe;

/// What a compression did, as `report.json` holds it.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// What was asked.
    pub recipe: Recipe,
    /// The whole model.
    pub summary: Summary,
    /// Each Linear, in the order of the checkpoint.
    pub linears: Vec<LinearReport>,
}

/// The whole model.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Summary {
    /// Format of the quantized Linears.
    pub format: &'static str,
    /// Bits of codes, scales, zero points and factors over the number of quantized weights.
    pub bits_per_weight: f64,
    /// Bytes of the folder, this report aside.
    pub bytes: u64,
    /// Bytes of the source's tensors.
    pub source_bytes: u64,
    /// Quantized weights.
    pub quantized_weights: u64,
    /// Tokens of calibration; 0 without.
    pub calibration_tokens: u64,
    /// Mean over the Linears; `null` without calibration.
    pub mean_error: Option<MeanError>,
    /// Wall time.
    pub seconds: f64,
    /// Where the time went.
    pub phases: PhaseSeconds,
    /// Largest resident set of the process so far; `null` where the system does not tell.
    pub peak_memory_bytes: Option<u64>,
}

/// Means of the relative output errors over the Linears.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct MeanError {
    /// Without compensation.
    pub quantized: f64,
    /// With it.
    pub compensated: f64,
}

/// Seconds by phase.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PhaseSeconds {
    /// Reading and checking weights.
    pub read: f64,
    /// Forward passes and second moments.
    pub calibrate: f64,
    /// The compression method.
    pub compress: f64,
    /// The compensation.
    pub compensate: f64,
    /// Writing.
    pub write: f64,
}

/// One Linear.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LinearReport {
    /// Name in the checkpoint.
    pub name: String,
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub columns: usize,
    /// Width of a code.
    pub bits: u8,
    /// Weights per group; `null` for the whole row.
    pub group_size: Option<usize>,
    /// Which way they lie.
    pub group_axis: GroupAxis,
    /// AWQ: exponent of the activations that its inputs are scaled by; `null` without.
    pub alpha: Option<f64>,
    /// Rank of the factors; 0 without.
    pub rank: usize,
    /// Calibration tokens that reached it, fewer than all for an expert; `null` when none did or without calibration.
    pub calibration_tokens: Option<u64>,
    /// Bits of codes, scales, zero points and factors.
    pub stored_bits: u64,
    /// Of its outputs on the calibration inputs; `null` where no calibration token reached it.
    pub error: Option<ResidualError>,
}

impl PhaseSeconds {
    /// The sums.
    #[must_use]
    pub fn plus(self, other: PhaseSeconds) -> PhaseSeconds {
        PhaseSeconds {
            read: self.read + other.read,
            calibrate: self.calibrate + other.calibrate,
            compress: self.compress + other.compress,
            compensate: self.compensate + other.compensate,
            write: self.write + other.write,
        }
    }
}

impl MeanError {
    /// Means over the Linears that have errors; `None` when none has.
    pub fn over(linears: &[LinearReport]) -> Option<MeanError> {
        let errors: Vec<ResidualError> = linears.iter().filter_map(|linear| linear.error).collect();
        let mean = |of: fn(&ResidualError) -> f64| errors.iter().map(of).sum::<f64>() / errors.len() as f64;
        (!errors.is_empty())
            .then(|| MeanError { quantized: mean(|e| e.quantized), compensated: mean(|e| e.compensated) })
    }
}
