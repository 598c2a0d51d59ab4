//! Perplexities and output errors of whole compressions against published figures (torch, float32).

use std::path::Path;

use crate::common::reference::measure;
use crate::common::{assets, perplexity};
use kintsugi_testkit::outlier_checkpoint::write_outlier_checkpoint;
use kintsugi_testkit::reference_rows::{FLOAT_PERPLEXITY, OUTLIERS, PLAIN, ReferenceRow};

/// Compresses by every row that the tests measure; fails after the last one with all that are off.
fn reach(source: &Path, rows: &[ReferenceRow]) {
    let scratch = tempfile::tempdir().unwrap();
    let mut failures = Vec::new();
    for row in rows.iter().filter(|row| row.tested) {
        let measured = measure(source, scratch.path(), row);
        for linear in &measured.report.linears {
            let error = linear.error.unwrap();
            assert!(error.compensated <= error.quantized * (1.0 + 1e-3), "{}: {error:?}", linear.name);
            assert!(error.bound <= error.compensated * (1.0 + 1e-6), "{}: {error:?}", linear.name);
        }
        let errors = measured.report.summary.mean_error.unwrap();
        let within = |found: f64, expected: f64, share: f64| (found / expected - 1.0).abs() <= share;
        if !within(measured.perplexity, row.perplexity, 0.01)
            || !within(errors.quantized, row.quantized, 0.02)
            || row.compensated.is_some_and(|expected| !within(errors.compensated, expected, 0.02))
        {
            failures.push(format!("{}: perplexity {}, {errors:?}; published {row:?}", row.name(), measured.perplexity));
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
    assert!((float / FLOAT_PERPLEXITY - 1.0).abs() < 1e-4, "the rewrite changed the function: {float}");
    reach(&source, &OUTLIERS);
}
