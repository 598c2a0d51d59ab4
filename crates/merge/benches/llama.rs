//! Merging one Linear of each shape of Llama-3-8B: 16 adapters of rank 64, synthetic factors. Prints one JSON line per
//! measurement, so that `bench/peers/merge_compare.py` can take turns with peft and scikit-learn in one run.
//!
//! `cargo bench -p kintsugi-merge --bench llama -- [METHOD] [OUTxIN] [REPEATS]`
#![allow(clippy::print_stdout, reason = "a bench prints what it measures")]

use std::hint::black_box;
use std::time::Instant;

use kintsugi_merge::{LinearSources, MergeOptions, MergeSource, RankRule, merge_linear, merge_method};
use kintsugi_runtime::{ThreadPool, peak_memory_bytes};
use kintsugi_testkit::Random;
use kintsugi_weights::{ElementType, LowRank};

const ADAPTERS: usize = 16;
const RANK: usize = 64;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with("--")).collect();
    let method = merge_method(arguments.first().map_or("svd", String::as_str)).unwrap();
    let shapes = arguments.get(1).map_or("4096x4096,1024x4096,14336x4096,4096x14336", String::as_str);
    let repeats: usize = arguments.get(2).map_or(3, |count| count.parse().unwrap());
    let pool = ThreadPool::global();
    for shape in shapes.split(',') {
        let (out, input) = shape.split_once('x').unwrap();
        let (out, input): (usize, usize) = (out.parse().unwrap(), input.parse().unwrap());
        let factors: Vec<LowRank> = (0..ADAPTERS as u64).map(|seed| adapter(out, input, seed)).collect();
        let (mut seconds, mut processor) = (Vec::new(), Vec::new());
        for _ in 0..repeats {
            let (started, used) = (Instant::now(), processor_seconds());
            let sources: Vec<MergeSource<'_>> = factors
                .iter()
                .map(|factors| MergeSource { factors, scaling: 2.0, weight: 1.0 / ADAPTERS as f64 })
                .collect();
            let linear = LinearSources::new("q_proj", &sources, ADAPTERS).unwrap();
            let options = MergeOptions { rank: Some(RankRule::Fixed(RANK)), report: false, ..MergeOptions::default() };
            black_box(merge_linear(method, &linear, &options, pool).unwrap());
            seconds.push(started.elapsed().as_secs_f64());
            processor.push(processor_seconds() - used);
        }
        seconds.sort_by(f64::total_cmp);
        processor.sort_by(f64::total_cmp);
        println!(
            r#"{{"method":"{}","out":{out},"in":{input},"threads":{},"seconds":{:.4},"cpuSeconds":{:.2},"peakMegabytes":{}}}"#,
            method.name(),
            pool.threads(),
            seconds[seconds.len() / 2],
            processor[processor.len() / 2],
            peak_memory_bytes().unwrap_or(0) / 1_000_000,
        );
    }
}

/// What the process has used of all processors, which other work on the machine changes little; 0 where the system does
/// not tell. Fields 14 and 15 of `/proc/self/stat`, in hundredths of a second.
fn processor_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let behind_name = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
    behind_name.split_whitespace().skip(11).take(2).filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / 100.0
}

fn adapter(out: usize, input: usize, seed: u64) -> LowRank {
    let mut random = Random::new(seed);
    let b = (0..out * RANK).map(|_| (random.normal() * 0.01) as f32).collect();
    let a = (0..RANK * input).map(|_| (random.normal() * 0.02) as f32).collect();
    LowRank::new(out, input, RANK, b, a, ElementType::Bf16)
}
