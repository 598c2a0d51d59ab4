use serde::Serialize;

use super::Spread;

/// What [`measure_speed`](super::measure_speed) measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct SpeedReport {
    /// Name of the CPU level of products and arithmetic ceilings.
    pub cpu_level: &'static str,
    /// Thread counts that were measured: one, and all.
    pub threads: Vec<usize>,
    /// Outputs of each matrix.
    pub out_features: usize,
    /// Inputs of each matrix.
    pub in_features: usize,
    /// Bytes of the last cache of the machine, all its parts together; `None` where the system does not tell.
    pub cache_bytes: Option<u64>,
    /// Bytes of the matrices of a kind that take turns, and of the loop that only reads.
    pub working_set_bytes: usize,
    /// What the machine can do.
    pub ceilings: Vec<CeilingSpeed>,
    /// What products reach.
    pub products: Vec<ProductSpeed>,
    /// What the products of one row leave for whole models; empty when one row was not measured.
    pub models: Vec<ModelSpeed>,
    /// Seconds that all of it took.
    pub seconds: f64,
}

/// The rate of a loop that does one thing only.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CeilingSpeed {
    /// `memory`: bytes read; `int8`, `f32`, `bf16`: operations of that arithmetic.
    pub kind: &'static str,
    /// What the loop consists of.
    pub instructions: &'static str,
    /// Number of threads.
    pub threads: usize,
    /// How many times it was measured.
    pub rounds: usize,
    /// Bytes or operations per second, all threads together.
    pub rate: Spread,
}

/// One kind of product.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ProductSpeed {
    /// `int4`, `int8` or `bf16`.
    pub weights: String,
    /// Columns that share a scale; `None` for plain floats.
    pub group_size: Option<usize>,
    /// Rank of a compensation in bf16; 0 for none.
    pub rank: usize,
    /// `f32`, `exact` or `fast`.
    pub precision: &'static str,
    /// What the precision comes to on this machine: `int8`, `bf16` or `f32`.
    pub arithmetic: &'static str,
    /// Bits in memory per weight, with scales and compensation.
    pub bits_per_weight: f64,
    /// Rows of x.
    pub rows: usize,
    /// Number of threads.
    pub threads: usize,
    /// How many times it was measured.
    pub rounds: usize,
    /// Seconds of a product.
    pub seconds: Spread,
    /// Bytes of the matrix per second, from the median.
    pub bytes_per_second: f64,
    /// Multiplications and additions per second, from the median.
    pub operations_per_second: f64,
    /// Which ceiling alone takes longer.
    pub limit: ProductLimit,
    /// Seconds that the ceilings of the same rounds would take, as a share of the median.
    pub share: f64,
}

/// What a product waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ProductLimit {
    /// Reading the matrix from memory.
    Memory,
    /// Multiplying.
    Arithmetic,
}

/// Tokens per second that products of one row leave to a model whose weights are all of one kind: bytes per second
/// over bytes of the weights. Attention, norms and sampling come on top.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ModelSpeed {
    /// Weights of the model.
    pub parameters: u64,
    /// As in [`ProductSpeed`].
    pub weights: String,
    /// As in [`ProductSpeed`].
    pub group_size: Option<usize>,
    /// As in [`ProductSpeed`].
    pub rank: usize,
    /// As in [`ProductSpeed`].
    pub precision: &'static str,
    /// Number of threads.
    pub threads: usize,
    /// At most.
    pub tokens_per_second: f64,
}

impl ProductSpeed {
    /// What this rate leaves to a model of so many weights.
    pub(super) fn model(&self, parameters: u64) -> ModelSpeed {
        ModelSpeed {
            parameters,
            weights: self.weights.clone(),
            group_size: self.group_size,
            rank: self.rank,
            precision: self.precision,
            threads: self.threads,
            tokens_per_second: self.bytes_per_second / (parameters as f64 * self.bits_per_weight / 8.0),
        }
    }
}
