//! Products against the ceilings of the same machine at the same time.
//!
//! Prints, for every CPU level and precision, the rate at which a product of one row streams a matrix as a share of a
//! loop that only reads, then the arithmetic rate of products of several rows as a share of loops that only multiply.
//! All candidates and ceilings take turns within each round, and the median over the rounds is printed, because
//! bandwidth and clock of shared machines drift. `kintsugi bench` shows a user the same in short.
//!
//! `cargo bench -p kintsugi-kernels --bench product -- [SECTION]...` with `KINTSUGI_THREADS` for the number of
//! threads and `KINTSUGI_CPU` for a single level. Sections are `stream`, `widths`, `residual`, `adapters`,
//! `shared`, `cached` and numbers of rows; all of them by default.
#![allow(clippy::print_stdout, reason = "a bench is there to print")]

use std::time::Instant;

use kintsugi_kernels::{
    ArithmeticCeiling, Kernels, MatrixRotation, PackedLowRank, PackedMatrix, Precision, ReadingCeiling, Spread,
};
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
    if wanted("widths") {
        [1, 8, 128].into_iter().for_each(|rows| widths(rows, pool));
    }
    if wanted("residual") {
        [1, 8, 512].into_iter().for_each(|rows| residual(rows, pool));
    }
    if wanted("adapters") {
        adapters(pool);
    }
    if wanted("shared") {
        [1, 8, 128].into_iter().for_each(|rows| shared(rows, pool));
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
    let reading = ReadingCeiling::new(READ_BYTES);
    let sets: Vec<(Precision, MatrixRotation)> =
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
        read.push(reading.rate(pool));
        for candidate in &mut candidates {
            candidate.run(&sets[candidate.matrices].1, &x, &mut y, pool);
        }
    }
    let read_rate = median(&read) / 1e9;
    let bytes = sets[0].1.matrix().memory_bytes();
    println!("\nint{bits} group 128, {SIZE}×{SIZE}, one row; a loop that only reads: {read_rate:.1} GB/s");
    for candidate in &candidates {
        let seconds = median(&candidate.seconds);
        let rate = bytes as f64 / seconds / 1e9;
        let share = 100.0 * rate / read_rate;
        println!("  {:<18} {:7.3} ms {rate:6.1} GB/s {share:5.0} % of reading", candidate.name, seconds * 1e3);
    }
}

/// Codes of 3, 5 and 6 bits beside those of the wider panels that the same numbers would fit into: what their bytes
/// save, and what their unpacking costs. Everything in turn, so that ratios hold on a busy machine.
fn widths(rows: usize, pool: &ThreadPool) {
    const WIDTHS: [(u8, u8); 3] = [(3, 4), (5, 8), (6, 8)];
    for group in [128, 32] {
        for precision in [Precision::F32, Precision::Fast] {
            let sets = [3, 4, 5, 6, 8].map(|bits| {
                let count = if rows > 64 { 1 } else { MATRICES / 2 };
                (bits, packed(&weight(bits, group), precision, count, pool))
            });
            let x = matrices::activations(1, rows, SIZE);
            let mut y = vec![0.0; rows * SIZE];
            for level in levels() {
                let kernels = Kernels::new(level).expect("the level is available");
                let mut rounds: Vec<Vec<f64>> = Vec::new();
                for _ in 0..2 * ROUNDS {
                    rounds.push(sets.iter().map(|(_, set)| set.seconds(&kernels, &x, &mut y, pool)).collect());
                }
                println!("\n{} {precision:?} group {group}, {SIZE}×{SIZE}, {rows} rows", level.name());
                let place = |bits: u8| sets.iter().position(|set| set.0 == bits).expect("every width has a matrix");
                for (narrow, wide) in WIDTHS.map(|(narrow, wide)| (place(narrow), place(wide))) {
                    let seconds = |set: usize| rounds.iter().map(|round| round[set]).collect::<Vec<_>>();
                    let ratios: Vec<f64> = rounds.iter().map(|round| round[narrow] / round[wide]).collect();
                    println!(
                        "  int{} {:8.3} ms, int{} {:8.3} ms: median of the ratios {:.2}",
                        sets[narrow].0,
                        median(&seconds(narrow)) * 1e3,
                        sets[wide].0,
                        median(&seconds(wide)) * 1e3,
                        median(&ratios)
                    );
                }
            }
        }
    }
}

/// The shortest of many short products with a matrix that stays in the cache, on one thread: what the instructions
/// take, on a machine that is not quiet too.
fn cached() {
    const OUTPUTS: usize = 256;
    let pool = ThreadPool::with_threads(1);
    println!("\n{OUTPUTS}×{SIZE} in the cache, one thread, the best of many");
    for ceiling in ceilings() {
        let best = (0..300).map(|_| ceiling.rate_of_one_call()).fold(0.0, f64::max);
        println!("  a loop of {}: {:.0} GOP/s", ceiling.instructions(), best / 1e9);
    }
    for (bits, group) in [(4, 128), (4, 64), (4, 32), (8, 128), (2, 128), (3, 128), (5, 128), (6, 128), (3, 32)] {
        let group = GroupSize::Columns(group);
        let matrix = matrices::quantized(1, OUTPUTS, SIZE, bits, group, true, ElementType::F16, false);
        let weight = LinearWeight::plain(WeightMatrix::Quantized(matrix));
        for precision in PRECISIONS {
            let rotation = packed(&weight, precision, 1, &pool);
            let matrix = rotation.matrix();
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
    for _ in 0..2 * ROUNDS {
        for candidate in &mut candidates {
            candidate.run(&sets[candidate.matrices], &x, &mut y, pool);
        }
    }
    println!(
        "\nint4 group 128 with a low-rank part, {SIZE}×{SIZE}, {rows} rows: medians of times, and of ratios of a round"
    );
    for candidate in &candidates {
        let time = median(&candidate.seconds) * 1e3;
        let share = 100.0 * (median_ratio(&candidate.seconds, &candidates[0].seconds) - 1.0);
        println!("  {:<24} {time:8.3} ms {share:+6.1} %", candidate.name);
    }
}

/// What adapters that are chosen per request cost: 8 rows with none, with one for all, and each with its own.
fn adapters(pool: &ThreadPool) {
    const REQUESTS: usize = 8;
    let kernels = Kernels::new(CpuLevel::best()).expect("the best level is available");
    let weight = kernels.pack(&weight(4, 128), Precision::Fast, pool).expect("the matrix is well-formed");
    let weights = vec![weight; MATRICES];
    let pack = |seed, rank| {
        let factors = Factors::Dense(ElementType::Bf16).matrices(seed, SIZE, SIZE, rank);
        kernels.pack_low_rank(&factors, 2.0, pool).expect("the adapter is well-formed")
    };
    // As many as there are matrices, so that no cache holds them either.
    let sets = [16, 64].map(|rank| {
        let of_matrix =
            |matrix: usize| (0..REQUESTS).map(move |request| pack((matrix * REQUESTS + request) as u64, rank));
        (rank, (0..MATRICES).map(|matrix| of_matrix(matrix).collect()).collect::<Vec<Vec<PackedLowRank>>>())
    });
    let x = matrices::activations(1, REQUESTS, SIZE);
    let mut y = vec![0.0; REQUESTS * SIZE];
    let mut run = |adapters: Option<(&[Vec<PackedLowRank>], bool)>| {
        let start = Instant::now();
        for (index, weight) in weights.iter().enumerate() {
            kernels.product(weight, &x, &mut y, pool);
            if let Some((adapters, own)) = adapters {
                let of_row = |row: usize| (row..row + 1, &adapters[index][row]);
                let updates =
                    if own { (0..REQUESTS).map(of_row).collect() } else { vec![(0..REQUESTS, &adapters[index][0])] };
                kernels.accumulate_low_ranks(&updates, &x, &mut y, pool);
            }
        }
        start.elapsed().as_secs_f64() / MATRICES as f64
    };
    let mut candidates = vec![("none".to_owned(), None)];
    for (rank, set) in &sets {
        candidates.push((format!("one of rank {rank} for all"), Some((&set[..], false))));
        candidates.push((format!("one of rank {rank} for each"), Some((&set[..], true))));
    }
    let mut seconds = vec![Vec::new(); candidates.len()];
    for _ in 0..2 * ROUNDS {
        for ((_, adapters), seconds) in candidates.iter().zip(&mut seconds) {
            seconds.push(run(*adapters));
        }
    }
    println!("\nint4 group 128, {SIZE}×{SIZE}, fast, {REQUESTS} rows with adapters in bf16");
    for ((name, _), own) in candidates.iter().zip(&seconds) {
        println!("  {name:<26} {:8.3} ms {:5.2}×", median(own) * 1e3, median_ratio(own, &seconds[0]));
    }
}

/// Query, key and value of one input with a low-rank part each: in three calls, in one, and in one with one A.
fn shared(rows: usize, pool: &ThreadPool) {
    const OUTPUTS: [usize; 3] = [SIZE, SIZE / 4, SIZE / 4];
    const RANK: usize = 64;
    let kernels = Kernels::new(CpuLevel::best()).expect("the best level is available");
    let count = if rows > 64 { 2 } else { MATRICES / 2 };
    let first = Factors::Dense(ElementType::Bf16).matrices(2, SIZE, SIZE, RANK);
    let group = |rank: usize| -> Vec<PackedMatrix> {
        let pack = |(seed, outputs): (u64, usize)| {
            let group_size = GroupSize::Columns(128);
            let matrix = matrices::quantized(seed, outputs, SIZE, 4, group_size, true, ElementType::F16, false);
            let low_rank = (rank > 0).then(|| first.of_outputs(0..outputs));
            let weight = LinearWeight { low_rank, ..LinearWeight::plain(WeightMatrix::Quantized(matrix)) };
            kernels.pack(&weight, Precision::Fast, pool).expect("the matrix is well-formed")
        };
        (1..).zip(OUTPUTS).map(pack).collect()
    };
    let groups = |rank: usize, share: bool| -> Vec<Vec<PackedMatrix>> {
        let mut groups = vec![group(rank); count];
        for group in groups.iter_mut().filter(|_| share) {
            let (first, others) = group.split_at_mut(1);
            others.iter_mut().for_each(|other| other.share_projection(&first[0]));
        }
        groups
    };
    let x = matrices::activations(1, rows, SIZE);
    let mut outputs = OUTPUTS.map(|outputs| vec![0.0; rows * outputs]);
    let mut run = |groups: &[Vec<PackedMatrix>], together: bool| {
        let start = Instant::now();
        for group in groups {
            let mut slices = outputs.each_mut().map(Vec::as_mut_slice);
            if together {
                kernels.products(&group.iter().collect::<Vec<_>>(), &x, &mut slices, pool);
            } else {
                group.iter().zip(&mut slices).for_each(|(matrix, y)| kernels.product(matrix, &x, y, pool));
            }
        }
        start.elapsed().as_secs_f64() / groups.len() as f64
    };
    let candidates = [
        ("plain, three calls", groups(0, false), false),
        ("plain, one call", groups(0, false), true),
        ("rank 64, three calls", groups(RANK, false), false),
        ("rank 64, one call", groups(RANK, false), true),
        ("rank 64, one call, one A", groups(RANK, true), true),
    ];
    let mut seconds = vec![Vec::new(); candidates.len()];
    for _ in 0..2 * ROUNDS {
        for ((_, groups, together), seconds) in candidates.iter().zip(&mut seconds) {
            seconds.push(run(groups, *together));
        }
    }
    println!("\nint4 group 128, {OUTPUTS:?}×{SIZE} of one input in fast, {rows} rows");
    for ((name, ..), own) in candidates.iter().zip(&seconds) {
        let (time, share) = (median(own) * 1e3, 100.0 * (median_ratio(own, &seconds[0]) - 1.0));
        println!("  {name:<26} {time:8.3} ms {share:+6.1} %");
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
        for (ceiling, rates) in ceilings.iter().zip(&mut rates) {
            rates.push(ceiling.rate(pool) / 1e9);
        }
        for candidate in &mut candidates {
            candidate.run(&sets[candidate.matrices], &x, &mut y, pool);
        }
    }
    println!("\n{SIZE}×{SIZE}, {rows} rows");
    for (ceiling, rates) in ceilings.iter().zip(&rates) {
        println!("  a loop of {}: {:.0} GOP/s", ceiling.instructions(), median(rates));
    }
    for candidate in &candidates {
        let seconds = median(&candidate.seconds);
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

    fn run(&mut self, matrices: &MatrixRotation, x: &[f32], y: &mut [f32], pool: &ThreadPool) {
        self.seconds.push(matrices.seconds(&self.kernels, x, y, pool));
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

fn packed(weight: &LinearWeight, precision: Precision, count: usize, pool: &ThreadPool) -> MatrixRotation {
    let kernels = Kernels::new(CpuLevel::best()).expect("the best level is available");
    MatrixRotation::new(kernels.pack(weight, precision, pool).expect("the matrix is well-formed"), count)
}

/// Those of the best level.
fn ceilings() -> Vec<ArithmeticCeiling> {
    ArithmeticCeiling::of(&Kernels::new(CpuLevel::best()).expect("the best level is available"))
}

fn seconds(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64()
}

fn median(values: &[f64]) -> f64 {
    Spread::of(values).median
}

/// The median of the ratios of rounds.
fn median_ratio(own: &[f64], others: &[f64]) -> f64 {
    median(&own.iter().zip(others).map(|(own, other)| own / other).collect::<Vec<_>>())
}
