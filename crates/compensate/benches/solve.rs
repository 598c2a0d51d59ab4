//! Seconds that a compensation takes, by shape and solver, on a residual of rounding to 3 bits and inputs whose spectrum
//! falls like a power with outlier channels.
//!
//! `cargo bench -p kintsugi-compensate --bench solve [-- SHAPE… [--rank R] [--solvers fast,exact] [--write DIR]]`, a SHAPE
//! being `OUTxIN`. With `--write` the matrices are left as `delta-OUTxIN.f32` and `s-IN.f64` for
//! `bench/peers/eora_torch.py`. `--block` solves the seven Linears of a Llama-3-8B block and says what 32 of them take;
//! with `--outputs` the energies of the original outputs are given, as a pass that takes statistics finds them.
//! `--energies` times the energy of a matrix in f32 and f64, in turns. `--equal-bytes` compares ranks and bits of factors that take about the same bytes, on spectra of several slopes.
#![allow(clippy::print_stdout, reason = "a bench is there to print")]

use std::io::Write;
use std::path::Path;
use std::time::Instant;

use kintsugi_calibration::{Calibration, CalibrationBuilder};
use kintsugi_compensate::{
    CompensationOptions, FactorPrecision, OutputSquares, Residual, compensate, compensation_method, output_energies,
    output_energy,
};
use kintsugi_linalg::{SplitMix64, quadratic_forms};
use kintsugi_runtime::ThreadPool;
use kintsugi_weights::{DenseMatrix, ElementType, GroupSize, QuantizedMatrix, QuantizedParts};

/// Outputs and inputs of the Linears of a block, those that read one input together.
const LLAMA_8B: [&[(usize, usize)]; 4] =
    [&[(4096, 4096), (1024, 4096), (1024, 4096)], &[(4096, 4096)], &[(14336, 4096), (14336, 4096)], &[(4096, 14336)]];
const BLOCKS: f64 = 32.0;
/// How the inputs fall unless something else is said.
const SLOPE: f32 = 0.4;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let value = |name: &str| arguments.iter().position(|a| a == name).and_then(|at| arguments.get(at + 1)).cloned();
    let rank = value("--rank").map_or(128, |rank| rank.parse().unwrap());
    let solvers = value("--solvers").unwrap_or_else(|| "fast,exact".into());
    let write = value("--write");
    let pool = ThreadPool::global();
    println!("{} threads, rank {rank}, residual of 3 bits in groups of 128\n", pool.threads());
    if arguments.iter().any(|argument| argument == "--block") {
        return block(rank, arguments.iter().any(|argument| argument == "--outputs"), pool);
    }
    let shape = |text: &String| text.split_once('x').and_then(|(m, k)| Some((m.parse().ok()?, k.parse().ok()?)));
    let mut shapes: Vec<(usize, usize)> = arguments.iter().filter_map(shape).collect();
    if arguments.iter().any(|argument| argument == "--energies") {
        return energies(shapes.first().copied().unwrap_or((4096, 4096)), pool);
    }
    if arguments.iter().any(|argument| argument == "--equal-bytes") {
        return equal_bytes(shapes.first().copied().unwrap_or((4096, 4096)), pool);
    }
    println!(
        "| shape | solver | seconds | of them energies | directions | error before | after | above the bound at most |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    if shapes.is_empty() {
        shapes = vec![(2048, 2048), (4096, 4096), (4096, 14336)];
    }
    for (rows, columns) in shapes {
        let calibration = inputs(columns, SLOPE, pool);
        let (weight, rounded) = weights(rows, columns);
        if let Some(folder) = &write {
            write_matrices(Path::new(folder), &weight, &rounded, &calibration);
        }
        for solver in solvers.split(',') {
            solve(&weight, &rounded, &calibration, None, (solver, rank), pool);
        }
    }
}

/// Solves and prints; gives the seconds.
fn solve(
    weight: &DenseMatrix,
    rounded: &QuantizedMatrix,
    calibration: &Calibration,
    outputs: Option<&OutputSquares>,
    (solver, rank): (&str, usize),
    pool: &ThreadPool,
) -> f64 {
    let precision = FactorPrecision::Float(ElementType::Bf16);
    let options = CompensationOptions { method: compensation_method(solver).unwrap(), rank, precision, affine: false };
    let started = Instant::now();
    let residual =
        Residual::new(weight, rounded, calibration, outputs.map(|outputs| outputs.calibration), pool).unwrap();
    let energies = started.elapsed().as_secs_f64();
    let directions = options.method.directions(&residual, rank, pool).unwrap();
    let found = started.elapsed().as_secs_f64() - energies;
    drop((residual, directions));
    let started = Instant::now();
    let solved = compensate(weight, rounded, calibration, None, outputs, &options, pool).unwrap();
    let seconds = started.elapsed().as_secs_f64();
    let above = solved.certificate.map_or(f64::NAN, |proof| proof.solved / proof.bound - 1.0);
    let error = solved.error;
    println!(
        "| {}×{} | {solver} | {seconds:.2} | {energies:.2} | {found:.2} | {:.4} | {:.4} | {above:.1e} |",
        weight.rows(),
        weight.columns(),
        error.quantized,
        error.compensated
    );
    seconds
}

fn block(rank: usize, known: bool, pool: &ThreadPool) {
    println!(
        "| shape | solver | seconds | of them energies | directions | error before | after | above the bound at most |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    let mut seconds = 0.0;
    for readers in LLAMA_8B {
        let calibration = inputs(readers[0].1, SLOPE, pool);
        for &(rows, columns) in readers {
            let (weight, rounded) = weights(rows, columns);
            let outputs = known.then(|| OutputSquares {
                calibration: output_energies(&[&weight], &calibration, &[None], pool)[0],
                held_out: Vec::new(),
            });
            seconds += solve(&weight, &rounded, &calibration, outputs.as_ref(), ("fast", rank), pool);
        }
    }
    println!("\na block: {seconds:.1} s; {BLOCKS} blocks, 224 Linears: {:.1} min", BLOCKS * seconds / 60.0);
}

/// Prints the seconds of one energy, in f32 and f64.
fn energies((rows, columns): (usize, usize), pool: &ThreadPool) {
    println!("{rows}×{columns}\n\n| f32 | f64 | values differ by |\n|---|---|---|");
    let (calibration, (weight, _)) = (inputs(columns, SLOPE, pool), weights(rows, columns));
    let (values, moments) = (weight.to_f32(), calibration.second_moment());
    let narrow = moments.map(|value| value as f32);
    for _ in 0..3 {
        let started = Instant::now();
        let fill = |i: usize, row: &mut [f32]| row.copy_from_slice(&values[i * columns..(i + 1) * columns]);
        let in_f32: f64 = quadratic_forms(rows, fill, &narrow, pool).iter().sum();
        let seconds = started.elapsed().as_secs_f64();
        let started = Instant::now();
        let in_f64 = output_energy(&values, rows, &calibration, pool);
        let wide = started.elapsed().as_secs_f64();
        println!("| {seconds:.2} | {wide:.2} | {:.1e} |", (in_f32 / in_f64 - 1.0).abs());
    }
}

/// Prints what factors of several ranks and bits leave, beside 16 bits of rank 64.
fn equal_bytes((rows, columns): (usize, usize), pool: &ThreadPool) {
    println!(
        "{rows}×{columns}\n\n| slope | bits | rank | bytes | beside rank 64 | error before | after | beside rank 64 |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    let (weight, rounded) = weights(rows, columns);
    for slope in [0.3, SLOPE, 0.5, 0.75] {
        let calibration = inputs(columns, slope, pool);
        let mut first = None;
        for (bits, rank) in [(16, 64), (8, 128), (4, 256)] {
            let precision = FactorPrecision::of_bits(bits).unwrap();
            let options = CompensationOptions { rank, precision, ..CompensationOptions::default() };
            let error = compensate(&weight, &rounded, &calibration, None, None, &options, pool).unwrap().error;
            let bytes = precision.stored_bits(rows, columns, rank) as f64 / 8.0;
            let (base_bytes, base_error) = *first.get_or_insert((bytes, error.compensated));
            println!(
                "| {slope} | {bits} | {rank} | {bytes} | {:+.1} % | {:.4} | {:.4} | {:+.1} % |",
                100.0 * (bytes / base_bytes - 1.0),
                error.quantized,
                error.compensated,
                100.0 * (error.compensated / base_error - 1.0)
            );
        }
    }
}

fn normal(random: &mut SplitMix64) -> f32 {
    ((0..6).map(|_| random.uniform()).sum::<f64>() - 3.0) as f32 * 2f32.sqrt()
}

/// Statistics of as many tokens as channels, at most 4096. Sizes of the principal components fall like `i^−slope`.
fn inputs(columns: usize, slope: f32, pool: &ThreadPool) -> Calibration {
    let mut random = SplitMix64::new(columns as u64);
    let size: Vec<f32> =
        (0..columns).map(|j| ((j + 1) as f32).powf(-slope) * if j % 97 == 5 { 20.0 } else { 1.0 }).collect();
    let reflection: Vec<f32> = (0..columns).map(|_| normal(&mut random)).collect();
    let norm: f32 = reflection.iter().map(|v| v * v).sum();
    let mut builder = CalibrationBuilder::new(columns);
    let tokens = columns.min(4096);
    for _ in (0..tokens).step_by(512) {
        let mut rows = Vec::with_capacity(512 * columns);
        for _ in 0..512 {
            let mut x: Vec<f32> = size.iter().map(|size| size * normal(&mut random)).collect();
            // Channels are correlated.
            let dot: f32 = x.iter().zip(&reflection).map(|(x, v)| x * v).sum();
            x.iter_mut().zip(&reflection).for_each(|(x, v)| *x -= 2.0 * dot * v / norm);
            rows.extend(x);
        }
        builder.push(&rows, pool).unwrap();
    }
    builder.finish(pool)
}

/// A weight and what rounding to 3 bits in groups of 128 makes of it.
fn weights(rows: usize, columns: usize) -> (DenseMatrix, QuantizedMatrix) {
    let mut random = SplitMix64::new((rows * 31 + columns) as u64);
    let values: Vec<f32> = (0..rows * columns).map(|_| ElementType::Bf16.round(normal(&mut random) * 0.02)).collect();
    let (mut codes, mut scales) = (Vec::with_capacity(values.len()), Vec::new());
    for group in values.chunks(128) {
        let largest = group.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
        let scale = ElementType::Bf16.round(largest / 3.5);
        scales.push(scale);
        codes.extend(group.iter().map(|value| (value / scale + 4.0).round().clamp(0.0, 7.0) as u8));
    }
    let rounded = QuantizedMatrix::new(QuantizedParts {
        rows,
        columns,
        bits: 3,
        group_size: GroupSize::Columns(128),
        codes,
        scales,
        scale_type: ElementType::Bf16,
        ..QuantizedParts::default()
    });
    (DenseMatrix::from_f32(rows, columns, values), rounded.unwrap())
}

fn write_matrices(folder: &Path, weight: &DenseMatrix, rounded: &QuantizedMatrix, calibration: &Calibration) {
    let (rows, columns) = (weight.rows(), weight.columns());
    let file = |name: String| std::io::BufWriter::new(std::fs::File::create(folder.join(name)).unwrap());
    let mut delta = file(format!("delta-{rows}x{columns}.f32"));
    for (original, rounded) in weight.to_f32().iter().zip(rounded.to_f32()) {
        delta.write_all(&(original - rounded).to_le_bytes()).unwrap();
    }
    let mut moments = file(format!("s-{columns}.f64"));
    for i in 0..columns {
        for j in 0..columns {
            moments.write_all(&calibration.second_moment().at(i, j).to_le_bytes()).unwrap();
        }
    }
}
