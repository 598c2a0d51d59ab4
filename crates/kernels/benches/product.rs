//! Products against the ceilings of the same machine at the same time.
//!
//! Prints, for every CPU level and precision, the rate at which a product of one row streams a matrix as a share of a
//! loop that only reads, then the arithmetic rate of products of several rows as a share of loops that only multiply.
//! All candidates and ceilings take turns within each round, and the median over the rounds is printed, because
//! bandwidth and clock of shared machines drift.
//!
//! `cargo bench -p kintsugi-kernels --bench product -- [SECTION]...` with `KINTSUGI_THREADS` for the number of
//! threads and `KINTSUGI_CPU` for a single level. Sections are `stream`, `residual`, `cached` and numbers of rows; all of them by default.
#![allow(clippy::print_stdout, reason = "a bench is there to print")]
#![allow(unsafe_code, reason = "the widest loads and products exist only as unsafe functions")]

use std::hint::black_box;
use std::time::Instant;

use kintsugi_kernels::{Kernels, PackedMatrix, Precision};
use kintsugi_runtime::{CpuLevel, ThreadPool};
use kintsugi_testkit::kernel_cases::Factors;
use kintsugi_testkit::matrices;
use kintsugi_weights::{ElementType, GroupSize, LinearWeight, WeightMatrix};

const SIZE: usize = 4096;
/// Together beyond any cache.
const MATRICES: usize = 28;
const ROUNDS: usize = 9;
const READ_BYTES: usize = 256 << 20;
const ROWS: [usize; 6] = [2, 4, 8, 16, 128, 512];

const PRECISIONS: [Precision; 3] = [Precision::F32, Precision::Exact, Precision::Fast];

struct Candidate {
    name: String,
    kernels: Kernels,
    /// Which set of matrices.
    matrices: usize,
    seconds: Vec<f64>,
}

fn main() {
    let sections: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let wanted = |section: &str| sections.is_empty() || sections.iter().any(|wanted| wanted == section);
    let pool = ThreadPool::global();
    println!("{} threads, best level {}", pool.threads(), CpuLevel::best().name());
    if wanted("stream") {
        [4, 8, 2].into_iter().for_each(|bits| stream(bits, pool));
    }
    if wanted("residual") {
        [1, 8, 512].into_iter().for_each(|rows| residual(rows, pool));
    }
    if wanted("cached") {
        cached();
    }
    for rows in ROWS {
        if wanted(&rows.to_string()) {
            arithmetic(rows, pool);
        }
    }
}

/// One row of x through many matrices, against a loop that only reads.
fn stream(bits: u8, pool: &ThreadPool) {
    let weight = weight(bits, 128);
    let buffer = vec![1u64; READ_BYTES / 8];
    let sets: Vec<(Precision, Vec<PackedMatrix>)> =
        PRECISIONS.map(|precision| (precision, packed(&weight, precision, MATRICES, pool))).into();
    let mut candidates = Vec::new();
    for level in levels() {
        for (index, (precision, _)) in sets.iter().enumerate() {
            candidates.push(Candidate::new(level, &format!("{precision:?}"), index));
        }
    }
    let x = matrices::activations(1, 1, SIZE);
    let mut y = vec![0.0; SIZE];
    let mut read = Vec::new();
    for _ in 0..ROUNDS {
        read.push(seconds(|| read_all(&buffer, pool)));
        for candidate in &mut candidates {
            candidate.run(&sets[candidate.matrices].1, &x, &mut y, pool);
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

/// The shortest of many short products with a matrix that stays in the cache, on one thread: what the instructions
/// take, on a machine that is not quiet too.
fn cached() {
    const OUTPUTS: usize = 256;
    let pool = ThreadPool::with_threads(1);
    println!("\n{OUTPUTS}×{SIZE} in the cache, one thread, the best of many");
    for (name, operations, ceiling) in ceilings() {
        let best = (0..300).map(|_| seconds(ceiling)).fold(f64::INFINITY, f64::min);
        println!("  a loop of {name}: {:.0} GOP/s", operations / best / 1e9);
    }
    for (bits, group) in [(4, 128), (4, 64), (4, 32), (8, 128), (2, 128)] {
        let group = GroupSize::Columns(group);
        let matrix = matrices::quantized(1, OUTPUTS, SIZE, bits, group, true, ElementType::F16, false);
        let weight = LinearWeight::plain(WeightMatrix::Quantized(matrix));
        for precision in PRECISIONS {
            let matrix = &packed(&weight, precision, 1, &pool)[0];
            for level in levels() {
                let kernels = Kernels::new(level).expect("the level is available");
                print!("  {:<10} {:<6} int{bits} {group:?}:", level.name(), format!("{precision:?}").to_lowercase());
                for rows in [1, 2, 3, 4, 6, 8, 12, 16, 64, 128] {
                    let x = matrices::activations(1, rows, SIZE);
                    let mut y = vec![0.0; rows * OUTPUTS];
                    let product = || kernels.product(matrix, &x, &mut y, &pool);
                    let best = best_of(product);
                    if rows == 1 {
                        print!(" {:.1} GB/s,", matrix.memory_bytes() as f64 / best / 1e9);
                    }
                    print!(" {:.0}", 2.0 * (rows * OUTPUTS * SIZE) as f64 / best / 1e9);
                }
                println!(" GOP/s");
            }
        }
    }
}

/// The shortest time of some that take 20 ms together.
fn best_of(mut work: impl FnMut()) -> f64 {
    let (mut best, start) = (f64::INFINITY, Instant::now());
    while start.elapsed().as_millis() < 20 {
        best = best.min(seconds(&mut work));
    }
    best
}

/// What a low-rank part inside of the panels costs, in precision `fast` at the best level.
fn residual(rows: usize, pool: &ThreadPool) {
    let count = if rows > 64 { 1 } else { MATRICES };
    let plain = weight(4, 128);
    let bf16 = Factors::Dense(ElementType::Bf16);
    let codes = |bits, group_size| Factors::Codes { bits, group_size };
    let kinds =
        [(0, bf16, ""), (16, bf16, "bf16"), (64, bf16, "bf16"), (64, codes(8, 64), "int8"), (64, codes(4, 32), "int4")];
    let sets = kinds.map(|(rank, factors, _)| {
        let low_rank = (rank > 0).then(|| factors.matrices(2, SIZE, SIZE, rank));
        packed(&LinearWeight { low_rank, ..plain.clone() }, Precision::Fast, count, pool)
    });
    let mut candidates: Vec<Candidate> = kinds
        .iter()
        .enumerate()
        .map(|(index, (rank, _, name))| Candidate::new(CpuLevel::best(), &format!("fast rank {rank} {name}"), index))
        .collect();
    let x = matrices::activations(1, rows, SIZE);
    let mut y = vec![0.0; rows * SIZE];
    for _ in 0..ROUNDS {
        for candidate in &mut candidates {
            candidate.run(&sets[candidate.matrices], &x, &mut y, pool);
        }
    }
    println!("\nint4 group 128 with a low-rank part, {SIZE}×{SIZE}, {rows} rows");
    let base = median(&mut candidates[0].seconds);
    for candidate in &mut candidates {
        let seconds = median(&mut candidate.seconds);
        let (time, share) = (seconds / count as f64 * 1e3, 100.0 * (seconds / base - 1.0));
        println!("  {:<24} {time:8.3} ms {share:+6.1} %", candidate.name);
    }
}

/// Several rows of x, with the matrices in turn, against loops that only multiply.
fn arithmetic(rows: usize, pool: &ThreadPool) {
    let count = if rows > 64 { 1 } else { MATRICES };
    let mut sets = Vec::new();
    let mut candidates = Vec::new();
    for (bits, group) in [(4, 128), (4, 64), (4, 32), (8, 128), (2, 128)] {
        let weight = weight(bits, group);
        for precision in PRECISIONS {
            let plain = precision != Precision::Fast;
            if plain && (bits, group) != (4, 128) {
                continue;
            }
            let index = sets.len();
            sets.push(packed(&weight, precision, count, pool));
            for level in levels() {
                candidates.push(Candidate::new(level, &format!("{precision:?} int{bits} g{group}"), index));
            }
        }
    }
    let x = matrices::activations(1, rows, SIZE);
    let mut y = vec![0.0; rows * SIZE];
    let ceilings = ceilings();
    let mut rates = vec![Vec::new(); ceilings.len()];
    for _ in 0..if rows > 64 { 7 } else { ROUNDS } {
        for ((_, operations, ceiling), rates) in ceilings.iter().zip(&mut rates) {
            let seconds = seconds(|| pool.for_each(256, |_| ceiling()));
            rates.push(*operations * 256.0 / seconds / 1e9);
        }
        for candidate in &mut candidates {
            candidate.run(&sets[candidate.matrices], &x, &mut y, pool);
        }
    }
    println!("\n{SIZE}×{SIZE}, {rows} rows");
    for ((name, ..), rates) in ceilings.iter().zip(&mut rates) {
        println!("  a loop of {name}: {:.0} GOP/s", median(rates));
    }
    for candidate in &mut candidates {
        let seconds = median(&mut candidate.seconds) / count as f64;
        let rate = 2.0 * (rows * SIZE * SIZE) as f64 / seconds / 1e9;
        println!("  {:<28} {:8.3} ms {rate:7.1} GOP/s", candidate.name, seconds * 1e3);
    }
}

impl Candidate {
    fn new(level: CpuLevel, name: &str, matrices: usize) -> Candidate {
        let kernels = Kernels::new(level).expect("the level is available");
        let name = format!("{} {}", level.name(), name.to_lowercase());
        Candidate { name, kernels, matrices, seconds: Vec::new() }
    }

    fn run(&mut self, matrices: &[PackedMatrix], x: &[f32], y: &mut [f32], pool: &ThreadPool) {
        self.seconds.push(seconds(|| {
            for matrix in matrices {
                self.kernels.product(matrix, x, y, pool);
            }
            black_box(&y);
        }));
    }
}

/// The level that `KINTSUGI_CPU` forces, else all but the scalar one where there are others.
fn levels() -> Vec<CpuLevel> {
    if std::env::var_os("KINTSUGI_CPU").is_some() {
        return vec![CpuLevel::selected().expect("KINTSUGI_CPU names a level of this machine")];
    }
    CpuLevel::available().filter(|level| *level != CpuLevel::Scalar || CpuLevel::best() == CpuLevel::Scalar).collect()
}

fn weight(bits: u8, group: usize) -> LinearWeight {
    let group = GroupSize::Columns(group);
    let matrix = matrices::quantized(1, SIZE, SIZE, bits, group, true, ElementType::F16, false);
    LinearWeight::plain(WeightMatrix::Quantized(matrix))
}

fn packed(weight: &LinearWeight, precision: Precision, count: usize, pool: &ThreadPool) -> Vec<PackedMatrix> {
    let kernels = Kernels::new(CpuLevel::best()).expect("the best level is available");
    let packed = kernels.pack(weight, precision, pool).expect("the matrix is well-formed");
    vec![packed; count]
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
        match CpuLevel::best() {
            // SAFETY: this CPU has AVX-512.
            CpuLevel::Avx512Vnni => return unsafe { sum_avx512(piece) },
            // SAFETY: this CPU has AVX2.
            CpuLevel::Avx2 | CpuLevel::AvxVnni => return unsafe { sum_avx2(piece) },
            _ => {}
        }
        black_box(piece.iter().fold(0u64, |sum, value| sum.wrapping_add(*value)));
    });
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn sum_avx512(values: &[u64]) {
    use std::arch::x86_64::*;
    let mut sums = [_mm512_setzero_si512(); 8];
    for line in values.as_chunks::<64>().0 {
        for i in 0..8 {
            // SAFETY: the eight registers cover the 64 values of the line.
            let part = unsafe { _mm512_loadu_si512(line.as_ptr().add(8 * i).cast()) };
            sums[i] = _mm512_add_epi64(sums[i], part);
        }
    }
    black_box(sums);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn sum_avx2(values: &[u64]) {
    use std::arch::x86_64::*;
    let mut sums = [_mm256_setzero_si256(); 8];
    for line in values.as_chunks::<32>().0 {
        for i in 0..8 {
            // SAFETY: the eight registers cover the 32 values of the line.
            let part = unsafe { _mm256_loadu_si256(line.as_ptr().add(4 * i).cast()) };
            sums[i] = _mm256_add_epi64(sums[i], part);
        }
    }
    black_box(sums);
}

/// Loops that keep the multipliers of a thread busy: what they do, operations, the loop.
fn ceilings() -> Vec<(&'static str, f64, fn())> {
    #[cfg(target_arch = "x86_64")]
    match CpuLevel::best() {
        CpuLevel::Avx512Vnni => {
            return vec![
                // SAFETY: this CPU has AVX-512 VNNI, AVX2 and FMA.
                ("vpdpbusd", (LOOPS * 12 * 128) as f64, || unsafe { dpbusd_avx512() }),
                // SAFETY: as above.
                ("vpmaddubsw and vpaddw", (LOOPS * 12 * 64) as f64, || unsafe { maddubs_avx2() }),
                // SAFETY: as above.
                ("vfmadd231ps zmm", (LOOPS * 12 * 32) as f64, || unsafe { fma_avx512() }),
                // SAFETY: as above, with BF16 where this CPU has it.
                ("vdpbf16ps", (LOOPS * 12 * 64) as f64, || unsafe { dpbf16_avx512() }),
            ];
        }
        CpuLevel::Avx2 | CpuLevel::AvxVnni => {
            return vec![
                // SAFETY: this CPU has AVX2 and FMA.
                ("vpmaddubsw and vpaddw", (LOOPS * 12 * 64) as f64, || unsafe { maddubs_avx2() }),
                // SAFETY: as above.
                ("vfmadd231ps ymm", (LOOPS * 12 * 16) as f64, || unsafe { fma_avx2() }),
            ];
        }
        _ => {}
    }
    Vec::new()
}

/// Some tens of microseconds: less than a scheduler gives a thread at a time.
#[cfg(target_arch = "x86_64")]
const LOOPS: usize = 1 << 13;

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vnni")]
fn dpbusd_avx512() {
    use std::arch::x86_64::*;
    let (a, b) = black_box((_mm512_set1_epi8(3), _mm512_set1_epi8(5)));
    let mut sums = [_mm512_setzero_si512(); 12];
    for _ in 0..LOOPS {
        for i in 0..12 {
            sums[i] = _mm512_dpbusd_epi32(sums[i], a, b);
        }
    }
    black_box(sums);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn fma_avx512() {
    use std::arch::x86_64::*;
    let (a, b) = black_box((_mm512_set1_ps(0.5), _mm512_set1_ps(0.25)));
    let mut sums = [_mm512_setzero_ps(); 12];
    for _ in 0..LOOPS {
        for i in 0..12 {
            sums[i] = _mm512_fmadd_ps(sums[i], a, b);
        }
    }
    black_box(sums);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
fn dpbf16_avx512() {
    use std::arch::x86_64::*;
    // SAFETY: both types are 512 plain bits.
    let as_bf16 = |words: __m512i| unsafe { std::mem::transmute::<__m512i, __m512bh>(words) };
    let (a, b) = black_box((as_bf16(_mm512_set1_epi16(0x3f00)), as_bf16(_mm512_set1_epi16(0x3e80))));
    let mut sums = [_mm512_setzero_ps(); 12];
    for _ in 0..LOOPS {
        for i in 0..12 {
            sums[i] = _mm512_dpbf16_ps(sums[i], a, b);
        }
    }
    black_box(sums);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn maddubs_avx2() {
    use std::arch::x86_64::*;
    let a = black_box(_mm256_set1_epi8(3));
    let mut sums = [_mm256_setzero_si256(); 12];
    for _ in 0..LOOPS {
        for i in 0..12 {
            // The product depends on the sum, so that it cannot be taken out of the loop.
            sums[i] = _mm256_add_epi16(a, _mm256_maddubs_epi16(a, sums[i]));
        }
    }
    black_box(sums);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn fma_avx2() {
    use std::arch::x86_64::*;
    let (a, b) = black_box((_mm256_set1_ps(0.5), _mm256_set1_ps(0.25)));
    let mut sums = [_mm256_setzero_ps(); 12];
    for _ in 0..LOOPS {
        for i in 0..12 {
            sums[i] = _mm256_fmadd_ps(sums[i], a, b);
        }
    }
    black_box(sums);
}
