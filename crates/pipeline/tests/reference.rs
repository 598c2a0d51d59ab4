//! Perplexities and output errors of whole compressions against published figures (torch, float32).
#![allow(clippy::print_stdout, reason = "the figures are worth a look: cargo test -- --nocapture")]

mod common;

use std::path::Path;

use common::{assets, backend, perplexity, recipe};
use kintsugi_pipeline::compress;
use kintsugi_runtime::{CancelToken, Progress};
use kintsugi_testkit::outlier_checkpoint::write_outlier_checkpoint;

/// Method, bits, rank; perplexity on `eval-wikitext.txt` at 256; mean relative output errors.
type Row = (&'static str, u8, usize, f64, f64, Option<f64>);

const PLAIN: [Row; 11] = [
    ("rtn", 2, 0, 120.430, 0.2257, None),
    ("rtn", 2, 32, 106.088, 0.2244, Some(0.1046)),
    ("gptq", 2, 0, 107.013, 0.1110, None),
    ("gptq", 2, 8, 106.628, 0.1109, Some(0.1018)),
    ("gptq", 2, 32, 104.216, 0.1109, Some(0.0815)),
    ("rtn", 3, 0, 103.488, 0.0959, None),
    ("gptq", 3, 0, 101.867, 0.0457, None),
    ("gptq", 3, 32, 101.359, 0.0457, Some(0.0339)),
    ("rtn", 4, 0, 101.122, 0.0446, None),
    ("gptq", 4, 0, 100.707, 0.0213, None),
    ("gptq", 4, 8, 100.704, 0.0212, Some(0.0195)),
];

const OUTLIERS: [Row; 10] = [
    ("rtn", 4, 0, 102.911, 0.0723, None),
    ("rtn", 3, 0, 105.215, 0.1138, None),
    ("rtn", 3, 8, 102.650, 0.1136, Some(0.0567)),
    ("rtn", 3, 32, 101.644, 0.1136, Some(0.0363)),
    ("gptq", 3, 0, 101.898, 0.0557, None),
    ("gptq", 3, 32, 101.153, 0.0556, Some(0.0293)),
    ("rtn", 2, 0, 124.095, 0.2356, None),
    ("gptq", 2, 0, 107.384, 0.1231, None),
    ("gptq", 2, 8, 105.993, 0.1237, Some(0.0866)),
    ("gptq", 2, 32, 104.811, 0.1234, Some(0.0689)),
];

/// Perplexity of the uncompressed model.
const FLOAT: f64 = 100.612;

/// Compresses by every row of the table; the test fails on the first figure that is off, after all were printed.
fn reach(source: &Path, table: &[Row]) {
    let scratch = tempfile::tempdir().unwrap();
    let mut failures = Vec::new();
    let mut uncompensated = f64::NAN;
    for &(method, bits, rank, expected, quantized, compensated) in table {
        let out = scratch.path().join(format!("{method}-{bits}-{rank}"));
        let recipe = recipe(source, &out, method, bits, rank);
        let report = compress(&recipe, &backend(), &CancelToken::new(), &Progress::new()).unwrap();
        let found = perplexity(&out, "eval-wikitext.txt", 256);
        let errors = report.summary.mean_error.unwrap();
        let mut line = format!(
            "{method} {bits} + {rank}: perplexity {found:.3} (published {expected}), error {:.4} ({quantized})",
            errors.quantized
        );
        if let Some(compensated) = compensated {
            let recovered = (uncompensated - found) / (uncompensated - FLOAT);
            line += &format!(", compensated {:.4} ({compensated}), recovered {recovered:.2}", errors.compensated);
        } else {
            uncompensated = found;
        }
        println!("{line}, {:.2} bits, {:.1} s", report.summary.bits_per_weight, report.summary.seconds);
        let within = |found: f64, expected: f64, share: f64| (found / expected - 1.0).abs() <= share;
        if !within(found, expected, 0.01)
            || !within(errors.quantized, quantized, 0.02)
            || compensated.is_some_and(|expected| !within(errors.compensated, expected, 0.02))
        {
            failures.push(line);
        }
        for linear in &report.linears {
            let error = linear.error.unwrap();
            assert!(error.compensated <= error.quantized * (1.0 + 1e-3), "{}: {error:?}", linear.name);
            assert!(error.bound <= error.compensated * (1.0 + 1e-6), "{}: {error:?}", linear.name);
        }
    }
    assert!(failures.is_empty(), "off the published figures:\n{}", failures.join("\n"));
}

#[test]
fn figures_of_the_plain_model_are_reached() {
    reach(&assets("llama-7m"), &PLAIN);
}

#[test]
fn figures_of_the_model_with_outliers_are_reached() {
    let scratch = tempfile::tempdir().unwrap();
    let source = scratch.path().join("outliers");
    write_outlier_checkpoint(&assets("llama-7m"), &assets("llama-7m-outliers/channels.json"), &source, 32, 2);
    let float = perplexity(&source, "eval-wikitext.txt", 256);
    assert!((float / FLOAT - 1.0).abs() < 1e-4, "the rewrite changed the function: {float}");
    reach(&source, &OUTLIERS);
}
