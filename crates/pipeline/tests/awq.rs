//! AWQ over whole checkpoints: scales that are folded into norms and rows, against rounding to nearest.
#![allow(clippy::print_stdout, reason = "the figures are worth a look: cargo test -- --nocapture")]

use std::path::Path;

use crate::common::{assets, backend, perplexity, recipe};
use kintsugi_pipeline::{Recipe, Report, compress};
use kintsugi_runtime::{CancelToken, Progress};
use kintsugi_testkit::outlier_checkpoint::write_outlier_checkpoint;

fn run(recipe: &Recipe) -> Report {
    compress(recipe, &backend(), &CancelToken::new(), &Progress::new()).unwrap()
}

fn awq(source: &Path, out: &Path, bits: u8, rounding: &str) -> Recipe {
    Recipe { rounding: rounding.to_owned(), clip: true, ..recipe(source, out, "awq", bits, 0) }
}

/// Share of the Linears whose output error is lower than in `other`; the rest is printed.
fn better(report: &Report, other: &Report) -> f64 {
    let mut wins = 0;
    for (linear, other) in report.linears.iter().zip(&other.linears) {
        let (found, before) = (linear.error.unwrap().quantized, other.error.unwrap().quantized);
        wins += usize::from(found < before);
        if found >= before {
            println!("  {} {:?}: {found:.4}, was {before:.4}", linear.name, linear.alpha);
        }
    }
    wins as f64 / report.linears.len() as f64
}

fn describe(name: &str, report: &Report, out: &Path) -> f64 {
    let found = perplexity(out, "eval-wikitext.txt", 256);
    let error = report.summary.mean_error.unwrap().quantized;
    println!("{name}: perplexity {found:.3}, error {error:.4}, {:.1} s", report.summary.seconds);
    found
}

#[test]
fn figures_of_the_model_with_outliers_are_reached() {
    let scratch = tempfile::tempdir().unwrap();
    let source = scratch.path().join("outliers");
    write_outlier_checkpoint(&assets("llama-7m"), &assets("llama-7m-outliers/channels.json"), &source, 32, 2);
    let out = |name: &str| scratch.path().join(name);
    let rtn = run(&recipe(&source, &out("rtn"), "rtn", 3, 0));
    for (rounding, most) in [("rtn", 103.8), ("gptq", 102.0)] {
        let name = format!("awq + {rounding}");
        let report = run(&awq(&source, &out(&name), 3, rounding));
        assert!(describe(&name, &report, &out(&name)) <= most);
        assert!(better(&report, &rtn) >= 0.95, "{name}");
    }
}

#[test]
fn linears_of_the_small_model_gain() {
    let scratch = tempfile::tempdir().unwrap();
    let source = assets("tinystories-656k");
    let out = |name: &str| scratch.path().join(name);
    let rtn = run(&recipe(&source, &out("rtn"), "rtn", 4, 0));
    let report = run(&awq(&source, &out("awq"), 4, "rtn"));
    println!("{:?} {:?}", rtn.summary.mean_error, report.summary.mean_error);
    assert!(better(&report, &rtn) >= 0.95);
}
