//! Every published figure of `assets/llama-7m`, plain and with outlier channels, beside what is measured here: a
//! Markdown table on stdout.
//!
//! `cargo bench -p kintsugi-pipeline --bench reference`
#![allow(clippy::print_stdout, reason = "a bench is there to print")]

#[path = "../tests/common/mod.rs"]
mod common;

use std::path::Path;

use common::assets;
use common::reference::measure;
use kintsugi_testkit::outlier_checkpoint::write_outlier_checkpoint;
use kintsugi_testkit::reference_rows::{FLOAT_PERPLEXITY, OUTLIERS, PLAIN, ReferenceRow};

fn main() {
    let scratch = tempfile::tempdir().unwrap();
    table("llama-7m", &assets("llama-7m"), scratch.path(), &PLAIN);
    let source = scratch.path().join("outliers");
    write_outlier_checkpoint(&assets("llama-7m"), &assets("llama-7m-outliers/channels.json"), &source, 32, 2);
    table("llama-7m with outlier channels", &source, scratch.path(), &OUTLIERS);
}

fn table(title: &str, source: &Path, scratch: &Path, rows: &[ReferenceRow]) {
    println!("\n{title}, perplexity uncompressed {FLOAT_PERPLEXITY}\n");
    println!(
        "| variant | bits/weight | perplexity | published | error | published | compensated | published | recovered |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    let mut uncompensated = f64::NAN;
    for row in rows {
        let measured = measure(source, scratch, row);
        let errors = measured.report.summary.mean_error.expect("there was calibration");
        let bits = measured.report.summary.bits_per_weight;
        print!("| {} | {bits:.2} ", row.name());
        print!(
            "| {:.3} | {:.3} | {:.4} | {:.4} ",
            measured.perplexity, row.perplexity, errors.quantized, row.quantized
        );
        match row.compensated {
            Some(published) => {
                let recovered = (uncompensated - measured.perplexity) / (uncompensated - FLOAT_PERPLEXITY);
                println!("| {:.4} | {published:.4} | {:.0} % |", errors.compensated, recovered * 100.0);
            }
            None => {
                uncompensated = measured.perplexity;
                println!("| | | |");
            }
        }
    }
}
