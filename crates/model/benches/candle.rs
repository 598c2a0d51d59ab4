//! Products beside candle's `QMatMul`, in one process and in turn.
//!
//! `KINTSUGI_THREADS=N RAYON_NUM_THREADS=N cargo bench --workspace --bench candle -- [ROWS]...`, with the same number of
//! threads for both. Activations are f32 on both sides, and quantizing them is part of every time.
#![allow(clippy::print_stdout, reason = "a bench is there to print")]

use std::hint::black_box;
use std::time::Instant;

use candle_core::quantized::{GgmlDType, QMatMul, QStorage, QTensor};
use candle_core::{Device, Module, Result, Tensor};
use kintsugi_kernels::{Kernels, MatrixRotation, Precision, Spread};
use kintsugi_runtime::ThreadPool;
use kintsugi_testkit::matrices;
use kintsugi_weights::{ElementType, GroupSize, LinearWeight, WeightMatrix};

const SIZE: usize = 4096;
/// Together beyond any cache.
const MATRICES: usize = 28;
const ROUNDS: usize = 9;
/// Rows from which on a round has one product.
const LONG_ROWS: usize = 64;

/// One engine with one format.
enum Candidate {
    Kintsugi { name: &'static str, matrices: MatrixRotation },
    Candle { name: &'static str, matrices: Vec<QMatMul> },
}

impl Candidate {
    fn kintsugi(
        name: &'static str,
        bits: u8,
        group: usize,
        precision: Precision,
        kernels: &Kernels,
        pool: &ThreadPool,
    ) -> Self {
        let packed = kernels.pack(&weight(bits, group), precision, pool).expect("the matrix is well-formed");
        Candidate::Kintsugi { name, matrices: MatrixRotation::new(packed, MATRICES) }
    }

    fn candle(name: &'static str, dtype: GgmlDType) -> Result<Self> {
        let values = weight(8, 32).matrix.to_f32();
        let quantized = QTensor::quantize(&Tensor::from_vec(values, (SIZE, SIZE), &Device::Cpu)?, dtype)?;
        let copy = || {
            let storage = QStorage::from_data(quantized.data()?, &Device::Cpu, dtype)?;
            QMatMul::from_qtensor(QTensor::new(storage, (SIZE, SIZE))?)
        };
        Ok(Candidate::Candle { name, matrices: (0..MATRICES).map(|_| copy()).collect::<Result<_>>()? })
    }

    fn name(&self) -> &'static str {
        match self {
            Candidate::Kintsugi { name, .. } | Candidate::Candle { name, .. } => name,
        }
    }

    /// The product with the first matrix.
    fn first(&self, x: &[f32], kernels: &Kernels, pool: &ThreadPool) -> Result<Vec<f32>> {
        let rows = x.len() / SIZE;
        match self {
            Candidate::Kintsugi { matrices, .. } => {
                let mut y = vec![0.0; rows * SIZE];
                kernels.product(matrices.matrix(), x, &mut y, pool);
                Ok(y)
            }
            Candidate::Candle { matrices, .. } => {
                let x = Tensor::from_slice(x, (rows, SIZE), &Device::Cpu)?;
                matrices[0].forward(&x)?.flatten_all()?.to_vec1()
            }
        }
    }

    /// Seconds of a product: each matrix once, or one of them where a product takes long.
    fn seconds(&self, round: usize, x: &[f32], y: &mut [f32], kernels: &Kernels, pool: &ThreadPool) -> Result<f64> {
        let rows = x.len() / SIZE;
        match self {
            Candidate::Kintsugi { matrices, .. } if rows >= LONG_ROWS => {
                Ok(matrices.seconds_of_one(round, kernels, x, y, pool))
            }
            Candidate::Kintsugi { matrices, .. } => Ok(matrices.seconds(kernels, x, y, pool)),
            Candidate::Candle { matrices, .. } => {
                let x = Tensor::from_slice(x, (rows, SIZE), &Device::Cpu)?;
                let matrices = if rows >= LONG_ROWS { &matrices[round % MATRICES..][..1] } else { matrices };
                let start = Instant::now();
                for matrix in matrices {
                    black_box(matrix.forward(&x)?);
                }
                Ok(start.elapsed().as_secs_f64() / matrices.len() as f64)
            }
        }
    }
}

fn main() -> Result<()> {
    let rows: Vec<usize> = std::env::args().skip(1).filter_map(|argument| argument.parse().ok()).collect();
    let rows = if rows.is_empty() { vec![1, 8, 128] } else { rows };
    let kernels = Kernels::selected().expect("KINTSUGI_CPU names a level of this machine");
    let pool = ThreadPool::global();
    let threads = candle_core::utils::get_num_threads();
    assert_eq!(threads, pool.threads(), "KINTSUGI_THREADS and RAYON_NUM_THREADS differ");
    println!("{threads} threads, level {}, {} matrices of {SIZE}×{SIZE} in turn", kernels.level().name(), MATRICES);
    let candidates = [
        Candidate::kintsugi("kintsugi fast int4 g128", 4, 128, Precision::Fast, &kernels, pool),
        Candidate::kintsugi("kintsugi fast int4 g32", 4, 32, Precision::Fast, &kernels, pool),
        Candidate::kintsugi("kintsugi exact int4 g128", 4, 128, Precision::Exact, &kernels, pool),
        Candidate::kintsugi("kintsugi fast int8 g32", 8, 32, Precision::Fast, &kernels, pool),
        Candidate::candle("candle Q4_0", GgmlDType::Q4_0)?,
        Candidate::candle("candle Q8_0", GgmlDType::Q8_0)?,
        Candidate::candle("candle Q4_K", GgmlDType::Q4K)?,
    ];
    check(&candidates[3], &candidates[5], &kernels, pool)?;
    for count in rows {
        let x = matrices::activations(1, count, SIZE);
        let mut y = vec![0.0; count * SIZE];
        let mut seconds = vec![Vec::new(); candidates.len()];
        // What is made at the first use, and threads that sleep, belong to a round that does not count.
        for round in 0..=ROUNDS {
            for (candidate, seconds) in candidates.iter().zip(&mut seconds) {
                let taken = candidate.seconds(round, &x, &mut y, &kernels, pool)?;
                if round > 0 {
                    seconds.push(taken);
                }
            }
        }
        println!(
            "\n| {count} {} | median | 10–90 % | times the first |\n|---|---|---|---|",
            ["row", "rows"][usize::from(count > 1)]
        );
        let first = Spread::of(&seconds[0]).median;
        for (candidate, seconds) in candidates.iter().zip(&seconds) {
            let Spread { low, median, high } = Spread::of(seconds);
            let [low, milliseconds, high] = [low, median, high].map(|seconds| seconds * 1e3);
            println!("| {} | {milliseconds:.3} ms | {low:.3}–{high:.3} | {:.2} |", candidate.name(), median / first);
        }
    }
    Ok(())
}

/// Both multiply the same numbers: candle's were made from our matrix of 8 bits, whose groups are as long as its blocks.
fn check(ours: &Candidate, theirs: &Candidate, kernels: &Kernels, pool: &ThreadPool) -> Result<()> {
    let x = matrices::activations(2, 2, SIZE);
    let (ours, theirs) = (ours.first(&x, kernels, pool)?, theirs.first(&x, kernels, pool)?);
    let squares = |values: &mut dyn Iterator<Item = f32>| values.map(|value| f64::from(value).powi(2)).sum::<f64>();
    let error = squares(&mut ours.iter().zip(&theirs).map(|(a, b)| a - b)) / squares(&mut theirs.iter().copied());
    assert!(error.sqrt() < 0.03, "the products differ by {}", error.sqrt());
    Ok(())
}

fn weight(bits: u8, group: usize) -> LinearWeight {
    let group = GroupSize::Columns(group);
    LinearWeight::plain(WeightMatrix::Quantized(matrices::quantized(
        1,
        SIZE,
        SIZE,
        bits,
        group,
        true,
        ElementType::F16,
        false,
    )))
}
