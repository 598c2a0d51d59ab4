//! The memory that a compression takes at most, beside its estimate, for models of real sizes with random weights: a
//! Markdown table on stdout. Each row is a process of its own.
//!
//! `cargo bench -p kintsugi-pipeline --bench memory`, or one row of it:
//! `… -- 8b|70b BLOCKS SEQUENCES LENGTH [RANK]`; `TMPDIR` needs up to 8 GB. `… -- open` measures how long it takes to
//! open a checkpoint of 16 GB and to plan for it.
#![allow(clippy::print_stdout, reason = "a bench is there to print")]

#[path = "../tests/common/mod.rs"]
mod common;

use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::{assets, backend, recipe};
use kintsugi_pipeline::{ActivationPlace, Recipe, compress, inspect, plan};
use kintsugi_runtime::{CancelToken, Progress, ThreadPool, private_memory_bytes};
use kintsugi_testkit::synthetic_checkpoint::{LlamaShapes, write_llama};

/// Model, blocks, sequences, tokens of a sequence, rank of the compensation.
const ROWS: [[&str; 5]; 4] = [
    ["8b", "3", "4", "2048", "0"],
    ["8b", "3", "8", "2048", "0"],
    ["70b", "1", "2", "2048", "0"],
    ["8b", "1", "1", "2048", "64"],
];
const SAMPLE_EVERY: Duration = Duration::from_millis(10);

fn main() {
    let given: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let given: Vec<&str> = given.iter().map(String::as_str).collect();
    match given.as_slice() {
        [] => {
            let run = |row: &[&str]| {
                let program = std::env::current_exe().expect("the program has a path");
                assert!(Command::new(program).args(row).status().expect("the program starts").success());
            };
            run(&["open"]);
            println!(
                "| model | blocks | tokens | rank | peak MiB | by block, and at the end | estimate MiB | seconds | phases |"
            );
            println!("|---|---|---|---|---|---|---|---|---|");
            ROWS.iter().for_each(|row| run(row));
        }
        ["open"] => open(),
        [model, blocks, sequences, length, rank @ ..] => {
            let number = |text: &str| text.parse().expect("it is a number");
            let shapes = match *model {
                "8b" => LlamaShapes::LLAMA_8B,
                "70b" => LlamaShapes::LLAMA_70B,
                _ => LlamaShapes { hidden: 256, intermediate: 768, heads: 8, kv_heads: 4, vocabulary: 4096, blocks: 1 },
            };
            let rank = rank.first().map_or(0, |rank| number(rank));
            measure(model, shapes.with_blocks(number(blocks)), number(sequences), number(length), rank);
        }
        _ => panic!("give nothing, 'open', or model, blocks, sequences, length and rank"),
    }
}

fn tokenizer() -> std::path::PathBuf {
    assets("llama-7m/tokenizer.json")
}

fn job(source: &Path, out: &Path, sequences: usize, length: usize, rank: usize) -> Recipe {
    let mut recipe = recipe(source, out, "gptq", 4, rank);
    recipe.group_size = Some(128);
    let calibration = recipe.calibration.as_mut().expect("there is calibration");
    calibration.sources[0].sequences = sequences;
    (calibration.length, calibration.activations) = (length, ActivationPlace::Disk);
    recipe
}

fn measure(model: &str, shapes: LlamaShapes, sequences: usize, length: usize, rank: usize) {
    let scratch = tempfile::tempdir().expect("there is a place for temporary files");
    let source = scratch.path().join("source");
    write_llama(&source, shapes, &tokenizer(), false);
    let recipe = job(&source, &scratch.path().join("out"), sequences, length, rank);
    let estimate = plan(&recipe).expect("the job fits").memory;
    let (progress, over) = (Progress::new(), AtomicBool::new(false));
    let started = Instant::now();
    let (report, peaks) = std::thread::scope(|scope| {
        let sampler = scope.spawn(|| {
            let mut peaks = vec![0; shapes.blocks + 1];
            while !over.load(Ordering::Relaxed) {
                let peak = &mut peaks[progress.snapshot().done as usize];
                *peak = private_memory_bytes().expect("the system tells").max(*peak);
                std::thread::sleep(SAMPLE_EVERY);
            }
            peaks
        });
        let report = compress(&recipe, &backend(), &CancelToken::new(), &progress);
        over.store(true, Ordering::Relaxed);
        (report.expect("the job succeeds"), sampler.join().expect("the sampler does not panic"))
    });
    let mebibytes = |bytes: u64| bytes >> 20;
    let of_blocks: Vec<String> = peaks.iter().map(|&peak| mebibytes(peak).to_string()).collect();
    println!(
        "| {model} | {} | {sequences} × {length} | {rank} | {} | {} | {} | {:.0} | {:?}, {} threads |",
        shapes.blocks,
        mebibytes(peaks.iter().copied().max().unwrap_or(0)),
        of_blocks.join(", "),
        mebibytes(estimate.peak_bytes),
        started.elapsed().as_secs_f64(),
        report.summary.phases,
        ThreadPool::global().threads(),
    );
}

fn open() {
    let scratch = tempfile::tempdir().expect("there is a place for temporary files");
    write_llama(scratch.path(), LlamaShapes::LLAMA_8B, &tokenizer(), true);
    let bytes = std::fs::metadata(scratch.path().join("model.safetensors")).expect("it was written").len();
    let recipe = job(scratch.path(), &scratch.path().join("out"), 128, 2048, 64);
    for _ in 0..3 {
        let started = Instant::now();
        let inspected = inspect(scratch.path()).expect("it opens");
        let inspect_seconds = started.elapsed().as_secs_f64();
        let started = Instant::now();
        let planned = plan(&recipe).map_or_else(|error| error.message, |plan| format!("{:?}", plan.memory.parts));
        println!(
            "{} tensors, {:.1} GB: inspected in {:.1} ms, planned in {:.1} ms ({planned})",
            inspected.tensors,
            bytes as f64 / 1e9,
            inspect_seconds * 1e3,
            started.elapsed().as_secs_f64() * 1e3
        );
    }
}
