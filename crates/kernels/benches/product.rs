//! Products against the memory bandwidth of the same machine at the same time.
//!
//! Prints, for every CPU level and precision, the rate at which a product of one row streams a 4-bit matrix, as a
//! share of a loop that only reads, and the arithmetic rate of products of several rows. All candidates take turns
//! within each round, and the median over the rounds is printed, because the bandwidth of shared machines drifts.
//!
//! `cargo bench -p kintsugi-kernels --bench product`, with `KINTSUGI_THREADS` for the number of threads.
#![allow(clippy::print_stdout, reason = "a bench is there to print")]
#![allow(unsafe_code, reason = "the widest loads exist only as unsafe functions")]

use std::hint::black_box;
use std::time::Instant;

use kintsugi_kernels::{Kernels, PackedMatrix, Precision};
use kintsugi_runtime::{CpuLevel, ThreadPool};
use kintsugi_testkit::matrices;
use kintsugi_weights::{ElementType, GroupSize, LinearWeight, WeightMatrix};

const SIZE: usize = 4096;
/// Together beyond any cache.
const MATRICES: usize = 28;
const ROUNDS: usize = 9;
const READ_BYTES: usize = 256 << 20;

struct Candidate {
    name: String,
    kernels: Kernels,
    matrices: usize,
    seconds: Vec<f64>,
}

fn main() {
    let pool = ThreadPool::global();
    println!("{} threads, best level {}", pool.threads(), CpuLevel::best().name());
    for bits in [4, 8, 2] {
        stream(bits, pool);
    }
    for rows in [2, 4, 8, 256] {
        arithmetic(rows, pool);
    }
}

/// One row of x through many matrices, against a loop that only reads.
fn stream(bits: u8, pool: &ThreadPool) {
    let weight = weight(bits);
    let buffer = vec![1u64; READ_BYTES / 8];
    let sets: Vec<(Precision, Vec<PackedMatrix>)> =
        [Precision::F32, Precision::Exact].map(|precision| (precision, packed(&weight, precision, pool))).into();
    let mut candidates = Vec::new();
    for level in CpuLevel::available() {
        for (index, (precision, _)) in sets.iter().enumerate() {
            let kernels = Kernels::new(level).expect("the level is available");
            let name = format!("{} {}", level.name(), format!("{precision:?}").to_lowercase());
            candidates.push(Candidate { name, kernels, matrices: index, seconds: Vec::new() });
        }
    }
    let x = matrices::activations(1, 1, SIZE);
    let mut y = vec![0.0; SIZE];
    let mut read = Vec::new();
    for _ in 0..ROUNDS {
        read.push(seconds(|| read_all(&buffer, pool)));
        for candidate in &mut candidates {
            let matrices = &sets[candidate.matrices].1;
            candidate.seconds.push(seconds(|| {
                for matrix in matrices {
                    candidate.kernels.product(matrix, &x, &mut y, pool);
                }
                black_box(&y);
            }));
        }
    }
    let read_rate = READ_BYTES as f64 / median(&mut read) / 1e9;
    let bytes = sets[0].1[0].memory_bytes();
    println!("\nint{bits} group 128, {SIZE}×{SIZE}, one row; a loop that only reads: {read_rate:.1} GB/s");
    for candidate in &mut candidates {
        let seconds = median(&mut candidate.seconds) / MATRICES as f64;
        let rate = bytes as f64 / seconds / 1e9;
        let share = 100.0 * rate / read_rate;
        println!("  {:<18} {:7.3} ms {rate:6.1} GB/s {share:5.0} % of reading", candidate.name, seconds * 1e3);
    }
}

/// Several rows of x, with the matrices in turn.
fn arithmetic(rows: usize, pool: &ThreadPool) {
    let weight = weight(4);
    let x = matrices::activations(1, rows, SIZE);
    let mut y = vec![0.0; rows * SIZE];
    println!("\nint4 group 128, {SIZE}×{SIZE}, {rows} rows");
    for level in CpuLevel::available() {
        let kernels = Kernels::new(level).expect("the level is available");
        for precision in [Precision::F32, Precision::Exact] {
            let count = if rows > 64 { 1 } else { MATRICES };
            let matrices: Vec<PackedMatrix> = packed(&weight, precision, pool).into_iter().take(count).collect();
            let rounds = if rows > 64 { 3 } else { ROUNDS };
            let mut taken: Vec<f64> = (0..rounds)
                .map(|_| {
                    seconds(|| {
                        for matrix in &matrices {
                            kernels.product(matrix, &x, &mut y, pool);
                        }
                    })
                })
                .collect();
            let seconds = median(&mut taken) / count as f64;
            let rate = 2.0 * (rows * SIZE * SIZE) as f64 / seconds / 1e9;
            let name = format!("{} {}", level.name(), format!("{precision:?}").to_lowercase());
            println!("  {name:<18} {:8.3} ms {rate:7.1} GFLOP/s", seconds * 1e3);
        }
    }
}

fn weight(bits: u8) -> LinearWeight {
    let matrix = matrices::quantized(1, SIZE, SIZE, bits, GroupSize::Columns(128), true, ElementType::F16, false);
    LinearWeight::plain(WeightMatrix::Quantized(matrix))
}

fn packed(weight: &LinearWeight, precision: Precision, pool: &ThreadPool) -> Vec<PackedMatrix> {
    let kernels = Kernels::new(CpuLevel::best()).expect("the best level is available");
    let packed = kernels.pack(weight, precision, pool).expect("the matrix is well-formed");
    vec![packed; MATRICES]
}

fn seconds(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64()
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Reads the buffer with every thread of the pool, in pieces of the size of a product's tasks.
fn read_all(buffer: &[u64], pool: &ThreadPool) {
    const PIECE: usize = (256 << 10) / 8;
    pool.for_each(buffer.len() / PIECE, |piece| {
        let piece = &buffer[piece * PIECE..][..PIECE];
        #[cfg(target_arch = "x86_64")]
        if CpuLevel::best() == CpuLevel::Avx512Vnni {
            // SAFETY: this CPU has AVX-512.
            black_box(unsafe { sum_avx512(piece) });
            return;
        }
        black_box(piece.iter().fold(0u64, |sum, value| sum.wrapping_add(*value)));
    });
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn sum_avx512(values: &[u64]) -> i64 {
    use std::arch::x86_64::*;
    let mut sums = [_mm512_setzero_si512(); 8];
    for line in values.as_chunks::<64>().0 {
        for i in 0..8 {
            // SAFETY: the eight registers cover the 64 values of the line.
            let part = unsafe { _mm512_loadu_si512(line.as_ptr().add(8 * i).cast()) };
            sums[i] = _mm512_add_epi64(sums[i], part);
        }
    }
    sums.into_iter().map(|sum| _mm512_reduce_add_epi64(sum)).fold(0, i64::wrapping_add)
}
