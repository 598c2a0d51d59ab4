//! Merging whole PEFT folders at the shapes of Llama-3-8B, synthetic bf16 factors. One JSON line per measurement.
//!
//! `cargo bench -p kintsugi-pipeline --bench merge -- cat FOLDER [BLOCKS] [ROUNDS]`: `cat` of 16 adapters of rank 64
//! against a plain copy of their files, in turns.
//! `cargo bench -p kintsugi-pipeline --bench merge -- job FOLDER METHOD ADAPTERS RANK [BLOCKS]`: one merge to rank 64 with
//! its report; time and peak memory of the process. The picture of the report stays in FOLDER.
//!
//! FOLDER is made and used for files: 10 MB per block, rank 64 and adapter, and as much again for the output of `cat`.
#![allow(clippy::print_stdout, reason = "a bench prints what it measures")]

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use half::bf16;
use kintsugi_checkpoint::{AdapterDescription, AdapterWriter, MergedModule, ModuleKind};
use kintsugi_merge::{MergeOptions, RankRule};
use kintsugi_pipeline::{MergeRecipe, RankPadding, WholeModuleRule, merge_adapters};
use kintsugi_runtime::{CancelToken, Progress, ThreadPool, peak_memory_bytes};
use kintsugi_testkit::Random;
use kintsugi_weights::{DenseMatrix, DenseValues, ElementType};

const LINEARS: [(&str, usize, usize); 7] = [
    ("mlp.down_proj", 4096, 14336),
    ("mlp.gate_proj", 14336, 4096),
    ("mlp.up_proj", 14336, 4096),
    ("self_attn.k_proj", 1024, 4096),
    ("self_attn.o_proj", 4096, 4096),
    ("self_attn.q_proj", 4096, 4096),
    ("self_attn.v_proj", 1024, 4096),
];

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with("--")).collect();
    let number = |at: usize, default: usize| arguments.get(at).map_or(default, |text| text.parse().unwrap());
    let Some(folder) = arguments.get(1).map(PathBuf::from) else { return };
    match arguments[0].as_str() {
        "cat" => cat(&folder, number(2, 2), number(3, 5)),
        "job" => job(&folder, &arguments[2], number(3, 16), number(4, 64), number(5, 1)),
        other => panic!("no bench is called {other}"),
    }
}

/// `cat` and a copy of the same files in turns, both until their output is on the disk.
fn cat(folder: &Path, blocks: usize, rounds: usize) {
    let adapters = adapters(folder, 16, 64, blocks);
    // Weight 1/2 undoes the scaling of 2: everything is moved. 1/16 multiplies A.
    for weight in [0.5, 1.0 / 16.0] {
        let (mut copies, mut merges) = (Vec::new(), Vec::new());
        let (mut copying, mut merging) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            let out = folder.join("out");
            let (started, used) = (Instant::now(), processor_seconds());
            fs::create_dir_all(&out).unwrap();
            for (i, adapter) in adapters.iter().enumerate() {
                copy(&adapter.join("adapter_model.safetensors"), &out.join(i.to_string()));
            }
            copies.push(started.elapsed().as_secs_f64());
            copying.push(processor_seconds() - used);
            fs::remove_dir_all(&out).unwrap();

            let (started, used) = (Instant::now(), processor_seconds());
            merge(&adapters, weight, "cat", None, false, &out);
            merges.push(started.elapsed().as_secs_f64());
            merging.push(processor_seconds() - used);
            fs::remove_dir_all(&out).unwrap();
        }
        let bytes: u64 =
            adapters.iter().map(|a| fs::metadata(a.join("adapter_model.safetensors")).unwrap().len()).sum();
        // Each merge against the copy before it, which other work on the machine slows down as much.
        let share = median(copies.iter().zip(&merges).map(|(copy, merge)| copy / merge).collect());
        let best = |values: &[f64]| values.iter().copied().fold(f64::INFINITY, f64::min);
        let (least_copy, least_merge) = (best(&copies), best(&merges));
        println!(
            r#"{{"bench":"cat","weight":{weight},"megabytes":{},"copySeconds":{:.3},"catSeconds":{:.3},"shareOfCopyBandwidth":{share:.2},"leastCopySeconds":{least_copy:.3},"leastCatSeconds":{least_merge:.3},"shareOfTheLeast":{:.2},"copyProcessorSeconds":{:.2},"catProcessorSeconds":{:.2}}}"#,
            bytes / 1_000_000,
            median(copies),
            median(merges),
            least_copy / least_merge,
            median(copying),
            median(merging),
        );
    }
}

/// One merge, for its time and the memory of the process.
fn job(folder: &Path, method: &str, count: usize, rank: usize, blocks: usize) {
    let adapters = adapters(folder, count, rank, blocks);
    let out = folder.join("out");
    let before = peak_memory_bytes().unwrap_or(0) / 1_000_000;
    let started = Instant::now();
    merge(&adapters, 1.0 / count as f64, method, Some(64), true, &out);
    println!(
        r#"{{"bench":"job","method":"{method}","adapters":{count},"rank":{rank},"blocks":{blocks},"seconds":{:.1},"peakMegabytesBefore":{before},"peakMegabytes":{}}}"#,
        started.elapsed().as_secs_f64(),
        peak_memory_bytes().unwrap_or(0) / 1_000_000
    );
    fs::rename(out.join("report.svg"), folder.join(format!("{method}-{count}x{rank}.svg"))).unwrap();
    fs::remove_dir_all(&out).unwrap();
}

fn merge(adapters: &[PathBuf], weight: f64, method: &str, rank: Option<usize>, report: bool, out: &Path) {
    let recipe = MergeRecipe {
        adapters: adapters.to_vec(),
        weights: vec![weight; adapters.len()],
        out: out.to_path_buf(),
        method: method.to_string(),
        options: MergeOptions { rank: rank.map(RankRule::Fixed), report, ..MergeOptions::default() },
        factor_type: None,
        padding: RankPadding::Uniform,
        allow_different_bases: false,
        calibration: None,
        compensation: None,
        total_rank: None,
        modules_to_save: WholeModuleRule::Equal,
        expected: std::collections::BTreeMap::new(),
    };
    merge_adapters(&recipe, ThreadPool::global(), &CancelToken::new(), &Progress::new()).unwrap();
}

/// Through memory, as a program without the help of the file system copies.
fn copy(from: &Path, to: &Path) {
    let (mut input, mut output) = (File::open(from).unwrap(), File::create(to).unwrap());
    let mut piece = vec![0; 1 << 20];
    loop {
        match input.read(&mut piece).unwrap() {
            0 => break,
            count => output.write_all(&piece[..count]).unwrap(),
        }
    }
    output.sync_all().unwrap();
}

/// What the process has used of all processors; 0 where the system does not tell. Fields 14 and 15 of `/proc/self/stat`,
/// in hundredths of a second.
fn processor_seconds() -> f64 {
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let behind_name = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
    behind_name.split_whitespace().skip(11).take(2).filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / 100.0
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Adapters with scaling 2, made where they are not there yet.
fn adapters(folder: &Path, count: usize, rank: usize, blocks: usize) -> Vec<PathBuf> {
    let mut random = Random::new(3);
    let mut values = |rows: usize, columns: usize| {
        // A table is enough: what is measured does not look at the numbers.
        let table: Vec<bf16> = (0..4099).map(|_| bf16::from_f64(random.normal() * 0.02)).collect();
        let start = random.below(4099);
        let values = (0..rows * columns).map(|i| table[(start + i) % 4099]).collect();
        DenseMatrix::new(rows, columns, DenseValues::Bf16(values))
    };
    let mut folders = Vec::new();
    for index in 0..count {
        let path = folder.join(format!("{count}x{rank}x{blocks}-{index}"));
        if !path.exists() {
            let modules: Vec<MergedModule> = (0..blocks)
                .flat_map(|block| {
                    LINEARS.map(|(name, out_features, in_features)| MergedModule {
                        name: format!("model.layers.{block}.{name}"),
                        kind: ModuleKind::Linear,
                        out_features,
                        in_features,
                        rank,
                    })
                })
                .collect();
            let description = AdapterDescription {
                base_model: None,
                task_type: None,
                fan_in_fan_out: false,
                targets_by_suffix: true,
                element_type: ElementType::Bf16,
                modules_to_save: Vec::new(),
            };
            let mut writer = AdapterWriter::create(&path, description, modules, &[]).unwrap();
            for module in writer.modules().to_vec() {
                let factors = [values(rank, module.in_features), values(module.out_features, rank)];
                writer.write_stored(|put| factors.iter().try_for_each(|factor| put(factor.bytes()))).unwrap();
            }
            writer.finish().unwrap();
            // The writer makes adapters of scaling 1.
            let config = path.join("adapter_config.json");
            let text = fs::read_to_string(&config).unwrap();
            let alpha = format!("\"lora_alpha\": {rank}");
            assert!(text.contains(&alpha));
            fs::write(&config, text.replace(&alpha, &format!("\"lora_alpha\": {}", 2 * rank))).unwrap();
        }
        folders.push(path);
    }
    folders
}
