//! Published figures of compressed variants of `assets/llama-7m` (torch, float32).
//!
//! Group 64, asymmetric, static groups, act-order, damping 0.01; calibrated on the first 64 × 256 tokens of
//! `calibration-wikipedia.txt`; perplexity on `eval-wikitext.txt` in windows of 256 tokens.

/// Perplexity of the uncompressed model, with outlier channels or without.
pub const FLOAT_PERPLEXITY: f64 = 100.612;

/// One variant.
#[derive(Clone, Copy, Debug)]
pub struct ReferenceRow {
    /// Compression method.
    pub method: &'static str,
    /// Width of a code.
    pub bits: u8,
    /// Rank of the compensation, 0 for none.
    pub rank: usize,
    /// Published perplexity.
    pub perplexity: f64,
    /// Published mean of ‖(W−Ŵ)X‖/‖WX‖ over the Linears.
    pub quantized: f64,
    /// Published mean of ‖(W−Ŵ−BA)X‖/‖WX‖.
    pub compensated: Option<f64>,
    /// Whether the tests measure it; the bench `reference` measures all.
    pub tested: bool,
}

const fn row(method: &'static str, bits: u8, rank: usize, perplexity: f64, quantized: f64) -> ReferenceRow {
    ReferenceRow { method, bits, rank, perplexity, quantized, compensated: None, tested: true }
}

impl ReferenceRow {
    const fn compensated(self, error: f64) -> Self {
        ReferenceRow { compensated: Some(error), ..self }
    }

    const fn in_the_bench(self) -> Self {
        ReferenceRow { tested: false, ..self }
    }

    /// The variant in a few words.
    pub fn name(&self) -> String {
        let method = self.method.to_uppercase();
        match self.rank {
            0 => format!("{method} {}", self.bits),
            rank => format!("{method} {} + EoRA {rank}", self.bits),
        }
    }
}

/// Variants of `llama-7m`. Those of one method and width follow each other, the uncompensated one first.
pub const PLAIN: [ReferenceRow; 11] = [
    row("rtn", 2, 0, 120.430, 0.2257),
    row("rtn", 2, 32, 106.088, 0.2244).compensated(0.1046),
    row("gptq", 2, 0, 107.013, 0.1110),
    row("gptq", 2, 8, 106.628, 0.1109).compensated(0.1018).in_the_bench(),
    row("gptq", 2, 32, 104.216, 0.1109).compensated(0.0815),
    row("rtn", 3, 0, 103.488, 0.0959).in_the_bench(),
    row("gptq", 3, 0, 101.867, 0.0457).in_the_bench(),
    row("gptq", 3, 32, 101.359, 0.0457).compensated(0.0339).in_the_bench(),
    row("rtn", 4, 0, 101.122, 0.0446).in_the_bench(),
    row("gptq", 4, 0, 100.707, 0.0213).in_the_bench(),
    row("gptq", 4, 8, 100.704, 0.0212).compensated(0.0195).in_the_bench(),
];

/// Variants of the same function with outlier channels.
pub const OUTLIERS: [ReferenceRow; 10] = [
    row("rtn", 4, 0, 102.911, 0.0723).in_the_bench(),
    row("rtn", 3, 0, 105.215, 0.1138),
    row("rtn", 3, 8, 102.650, 0.1136).compensated(0.0567).in_the_bench(),
    row("rtn", 3, 32, 101.644, 0.1136).compensated(0.0363),
    row("gptq", 3, 0, 101.898, 0.0557),
    row("gptq", 3, 32, 101.153, 0.0556).compensated(0.0293),
    row("rtn", 2, 0, 124.095, 0.2356).in_the_bench(),
    row("gptq", 2, 0, 107.384, 0.1231).in_the_bench(),
    row("gptq", 2, 8, 105.993, 0.1237).compensated(0.0866).in_the_bench(),
    row("gptq", 2, 32, 104.811, 0.1234).compensated(0.0689).in_the_bench(),
];
