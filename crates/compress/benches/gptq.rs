//! GPTQ of one Linear from its second moments: seconds of the factorization and of the whole, and the output error.
//!
//! `cargo bench -p kintsugi-compress --bench gptq [-- SIZE TOKENS]`, with `KINTSUGI_THREADS` for the number of threads.
//! `bench/peers/gptq_torch.py` makes the same matrices and solves them with torch.
#![allow(clippy::print_stdout, reason = "a bench is there to print")]

use std::time::Instant;

use kintsugi_calibration::{Calibration, CalibrationBuilder};
use kintsugi_compress::{QuantizeOptions, gptq, rtn};
use kintsugi_linalg::{MatrixView, UpperCholesky, UpperTriangle, quadratic_trace};
use kintsugi_runtime::ThreadPool;
use kintsugi_testkit::Random;
use kintsugi_weights::{DenseMatrix, ElementType, QuantizedMatrix};

/// Channels that share a factor: every 32nd.
const FACTORS: usize = 32;
const ROUNDS: usize = 3;

fn main() {
    let mut arguments = std::env::args().skip(1).filter_map(|argument| argument.parse().ok());
    let size: usize = arguments.next().unwrap_or(4096);
    let tokens: usize = arguments.next().unwrap_or(2 * size);
    let pool = ThreadPool::global();
    println!("{size}×{size}, {tokens} tokens, {} threads, 4 bits, groups of 128, act-order", pool.threads());
    let mut random = Random::new(1);
    let values: Vec<f32> = (0..size * size).map(|_| (random.normal() * 0.02) as f32).collect();
    let weight = DenseMatrix::from_f32(size, size, values);
    let calibration = calibration(size, tokens, pool);
    let energy =
        quadratic_trace(MatrixView::new(&wide(&weight.to_f32()), size, size), calibration.second_moment(), pool);

    let options = QuantizeOptions { scale_type: ElementType::F32, ..Default::default() };
    let moment = calibration.second_moment();
    for _ in 0..ROUNDS {
        let started = Instant::now();
        let mean = moment.diagonal().iter().sum::<f64>() / size as f64;
        let fill = |i: usize, row: &mut [f64]| row.copy_from_slice(moment.row(i));
        let factored = UpperCholesky::new(size, options.damping * mean, fill, pool).expect("the matrix is definite");
        let factor = started.elapsed().as_secs_f64();
        drop(factored);
        let started = Instant::now();
        let solved = gptq(&weight, &calibration, &options, pool).expect("the input is valid");
        let whole = started.elapsed().as_secs_f64();
        let error = (error(&weight, &solved.matrix, moment, pool) / energy).sqrt();
        println!("factor {factor:.3} s, sweep {:.3} s, whole {whole:.3} s, error {error:.6}", whole - factor);
    }
    let started = Instant::now();
    let rounded = rtn(&weight, None, &options, pool).expect("the input is valid");
    let seconds = started.elapsed().as_secs_f64();
    println!("rtn {seconds:.3} s, error {:.6}", (error(&weight, &rounded, moment, pool) / energy).sqrt());
}

/// Statistics of `x_j = c_j (z_j + 2 a_{j mod 32})` with normal z and a: sizes that fall as a power law, every 37th
/// thirty times as large, and correlated channels.
fn calibration(size: usize, tokens: usize, pool: &ThreadPool) -> Calibration {
    let mut random = Random::new(2);
    let sizes: Vec<f64> =
        (0..size).map(|j| if j % 37 == 36 { 30.0 } else { 1.0 } / (1.0 + j as f64).powf(0.3)).collect();
    let mut builder = CalibrationBuilder::new(size);
    let mut row = vec![0.0f32; size];
    for _ in 0..tokens {
        let factors: Vec<f64> = (0..FACTORS).map(|_| random.normal()).collect();
        for (j, value) in row.iter_mut().enumerate() {
            *value = (sizes[j] * (random.normal() + 2.0 * factors[j % FACTORS])) as f32;
        }
        builder.push(&row, pool).expect("the rows are finite");
    }
    builder.finish(pool)
}

fn error(weight: &DenseMatrix, quantized: &QuantizedMatrix, moment: &UpperTriangle<f64>, pool: &ThreadPool) -> f64 {
    let (before, after) = (weight.to_f32(), quantized.to_f32());
    let difference: Vec<f64> = before.iter().zip(&after).map(|(&a, &b)| f64::from(a) - f64::from(b)).collect();
    quadratic_trace(MatrixView::new(&difference, weight.rows(), weight.columns()), moment, pool)
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&value| f64::from(value)).collect()
}
