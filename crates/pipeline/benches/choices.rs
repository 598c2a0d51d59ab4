//! What the choices per Linear gain, at equal bits: the axis of the groups (AdaDim), and widths under a bit budget. Markdown
//! tables on stdout.
//!
//! `cargo bench -p kintsugi-pipeline --bench choices [-- axes [input|output|adaptive] | budgets]`
#![allow(clippy::print_stdout, reason = "a bench is there to print")]

#[path = "../tests/common/mod.rs"]
mod common;

use common::{assets, backend, perplexity, recipe};
use kintsugi_compress::AxisRule;
use kintsugi_pipeline::{Recipe, compress};
use kintsugi_runtime::{CancelToken, Progress};
use kintsugi_testkit::outlier_checkpoint::write_outlier_checkpoint;
use kintsugi_weights::GroupAxis;

const TEXTS: [&str; 3] = ["eval-wikitext.txt", "eval-stories.txt", "eval-shakespeare.txt"];

fn main() {
    let mut arguments = std::env::args().skip(1).filter(|argument| !argument.starts_with('-'));
    let (part, only) = (arguments.next(), arguments.next());
    let asked = |name: &str| part.as_deref().is_none_or(|part| part == name);
    let scratch = tempfile::tempdir().unwrap();
    let (plain, outliers) = (assets("llama-7m"), scratch.path().join("outliers"));
    write_outlier_checkpoint(&plain, &assets("llama-7m-outliers/channels.json"), &outliers, 32, 2);
    if asked("budgets") {
        head("llama-7m, groups of 64");
        for method in ["rtn", "gptq"] {
            for bits in [3, 4] {
                let uniform = recipe(&plain, &scratch.path().join("out"), method, bits, 0);
                let spent = row(&format!("{method}, {bits} bits"), &uniform);
                let budget = Recipe { bit_budget: Some(spent), ..uniform };
                row(&format!("{method}, {spent:.2} bits per weight divided"), &budget);
            }
        }
    }
    if asked("axes") {
        for (name, source) in [("llama-7m", &plain), ("llama-7m with outlier channels", &outliers)] {
            head(&format!("{name}, 3 bits, groups of 64"));
            for method in ["rtn", "gptq"] {
                for (axis, group_axis) in AxisRule::NAMES
                    .iter()
                    .filter(|name| only.as_deref().is_none_or(|only| only == **name))
                    .map(|name| (name, AxisRule::from_name(name).unwrap()))
                {
                    let job = recipe(source, &scratch.path().join("out"), method, 3, 0);
                    row(&format!("{method}, {axis}"), &Recipe { group_axis, ..job });
                }
            }
        }
    }
}

fn head(title: &str) {
    println!("\n{title}\n\n| | bits/weight | error | {} | |", TEXTS.join(" | "));
    println!("|---|---|---|---|---|---|---|");
}

/// Compresses, measures, and gives the bits per weight.
fn row(name: &str, recipe: &Recipe) -> f64 {
    let report = compress(recipe, &backend(), &CancelToken::new(), &Progress::new()).unwrap();
    let texts = TEXTS.map(|text| format!("{:.3}", perplexity(&recipe.out, text, 256)));
    let error = report.summary.mean_error.expect("there was calibration").quantized;
    let outputs = report.linears.iter().filter(|linear| linear.group_axis == GroupAxis::Output).count();
    let mut widths: Vec<u8> = report.linears.iter().map(|linear| linear.bits).collect();
    widths.sort_unstable();
    let of_width = |bits: u8| widths.iter().filter(|&&width| width == bits).count();
    let counts: Vec<String> =
        (2..=8).filter(|&bits| of_width(bits) > 0).map(|bits| format!("{} × {bits} bits", of_width(bits))).collect();
    let notes = format!(
        "{}{}",
        counts.join(", "),
        if outputs > 0 { format!(", {outputs} along the outputs") } else { String::new() }
    );
    println!("| {name} | {:.2} | {error:.4} | {} | {notes} |", report.summary.bits_per_weight, texts.join(" | "));
    std::fs::remove_dir_all(&recipe.out).unwrap();
    report.summary.bits_per_weight
}
