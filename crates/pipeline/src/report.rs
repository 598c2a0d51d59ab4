use std::path::PathBuf;

use kintsugi_compensate::{Certificate, DenseError, HoldOutError, ResidualError};
use kintsugi_weights::GroupAxis;
use serde::{Deserialize, Serialize};

use crate::{AllocationReport, CalibrationKind, CalibrationSource, Recipe};

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
    pub format: String,
    /// What a GGUF file does not say of the source, as sentences for the user.
    pub notices: Vec<String>,
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
    /// The same by source; empty without.
    pub calibration: Vec<CalibrationShare>,
    /// Mean over the Linears, where several share an A each with the error of all; `null` without calibration.
    pub mean_error: Option<MeanError>,
    /// The compensation; `null` without.
    pub compensation: Option<CompensationSummary>,
    /// Wall time.
    pub seconds: f64,
    /// Where the time went.
    pub phases: PhaseSeconds,
    /// Largest resident set of the process so far; `null` where the system does not tell.
    pub peak_memory_bytes: Option<u64>,
}

/// What a source gives to the statistics of a job.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CalibrationShare {
    /// The file.
    pub file: PathBuf,
    /// What it holds.
    pub kind: CalibrationKind,
    /// Tokens that took part, or that the statistics were taken from.
    pub tokens: u64,
    /// How often each of them counts.
    pub weight: f64,
    /// What all of them count, as a share of all sources. Tokens of statistics count what they counted when these were
    /// saved, times the weight.
    pub share: f64,
}

impl CalibrationShare {
    /// Those of sources with so many tokens, each with what its tokens count before the weight of the source.
    pub(crate) fn of(sources: &[CalibrationSource], tokens: &[(u64, f64)]) -> Vec<Self> {
        let counts = |source: &CalibrationSource, (tokens, each): (u64, f64)| source.weight * each * tokens as f64;
        let total: f64 = sources.iter().zip(tokens).map(|(source, &given)| counts(source, given)).sum();
        let of_source = |(source, &given): (&CalibrationSource, &(u64, f64))| CalibrationShare {
            file: source.file.clone(),
            kind: source.kind,
            tokens: given.0,
            weight: source.weight,
            share: if total > 0.0 { counts(source, given) / total } else { 0.0 },
        };
        sources.iter().zip(tokens).map(of_source).collect()
    }
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

/// All compensations of a model.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CompensationSummary {
    /// Mean rank over the Linears that have errors.
    pub mean_rank: f64,
    /// The largest quotient of an error and its bound: what rounding the factors costs, and the solver. `null` where no
    /// bound is above zero.
    pub worst_ratio: Option<f64>,
    /// Linears whose compensation is proven to be the best.
    pub certified: usize,
    /// Linears whose solver promised that and did not prove it.
    pub uncertified: usize,
    /// Means over the Linears of the errors on inputs that took no part in the calibration; `null` without such inputs.
    pub hold_out: Option<MeanError>,
    /// The same against the outputs of the dense model, or on the calibration inputs where none were held out; `null` unless
    /// the compensation was solved for both inputs.
    pub dense_error: Option<MeanError>,
    /// How a budget of ranks was divided; `null` for one rank.
    pub allocation: Option<AllocationReport>,
}

impl CompensationSummary {
    /// Over the Linears of a job that compensates; `None` where none was solved.
    pub(crate) fn over(linears: &[LinearReport], allocation: Option<AllocationReport>) -> Option<Self> {
        let solved = || linears.iter().filter(|linear| linear.error.is_some());
        if !linears.iter().any(|linear| linear.rank > 0 || linear.certificate.is_some()) {
            return None;
        }
        let proofs = || linears.iter().filter_map(|linear| linear.certificate);
        let ratio = |linear: &LinearReport| {
            linear.error.filter(|error| error.bound > 0.0).map(|error| error.compensated / error.bound)
        };
        let held = linears.iter().filter_map(|linear| linear.hold_out);
        let dense = linears.iter().filter_map(|linear| linear.dense_error);
        let against_dense = match dense.clone().any(|error| error.hold_out.is_some()) {
            true => MeanError::of(dense.filter_map(|error| error.hold_out).map(|e| (e.quantized, e.compensated))),
            false => MeanError::of(dense.map(|error| (error.quantized, error.compensated))),
        };
        Some(CompensationSummary {
            mean_rank: solved().map(|linear| linear.rank).sum::<usize>() as f64 / solved().count().max(1) as f64,
            worst_ratio: linears.iter().filter_map(ratio).reduce(f64::max),
            certified: proofs().filter(|proof| proof.holds).count(),
            uncertified: proofs().filter(|proof| !proof.holds).count(),
            hold_out: MeanError::of(held.map(|error| (error.quantized, error.compensated))),
            dense_error: against_dense,
            allocation,
        })
    }
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
    /// Bits of codes, scales, zero points and factors; those of an A that several share with the first of them.
    pub stored_bits: u64,
    /// The Linears that it shares A of its compensation with: ranks, errors and certificate are then those of all together,
    /// each relative to the size of its outputs, by powers of two.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shared_with: Vec<String>,
    /// Of its outputs on the calibration inputs; `null` where no calibration token reached it.
    pub error: Option<ResidualError>,
    /// On inputs that took no part in the calibration; `null` without compensation or such inputs.
    pub hold_out: Option<HoldOutError>,
    /// Against the outputs of the dense model on its own inputs; `null` unless the compensation was solved for both inputs.
    #[serde(default)]
    pub dense_error: Option<DenseError>,
    /// The proof that the compensation is the best one of the largest rank; `null` without one.
    pub certificate: Option<Certificate>,
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
        Self::of(linears.iter().filter_map(|linear| linear.error).map(|error| (error.quantized, error.compensated)))
    }

    /// Means over errors without compensation and with it; `None` when there are none.
    fn of(errors: impl Iterator<Item = (f64, f64)>) -> Option<MeanError> {
        let (mut sums, mut count) = ((0.0, 0.0), 0.0);
        for (quantized, compensated) in errors {
            sums = (sums.0 + quantized, sums.1 + compensated);
            count += 1.0;
        }
        (count > 0.0).then(|| MeanError { quantized: sums.0 / count, compensated: sums.1 / count })
    }
}
