//! Very many small products from several threads at once, all on one pool.
//!
//! `KINTSUGI_PRODUCTS` sets how many; a test in a file of its own, because it looks at the memory of its process.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Barrier;
use std::thread;

use kintsugi_kernels::{Kernels, PackedMatrix, Precision};
use kintsugi_runtime::{ThreadPool, private_memory_bytes};
use kintsugi_testkit::kernel_cases::Factors;
use kintsugi_testkit::matrices;
use kintsugi_weights::{ElementType, GroupSize, LinearWeight, WeightMatrix};

const CALLERS: usize = 4;

/// By default: some seconds on two busy cores.
const PRODUCTS: usize = 20_000;

/// Beyond what a system gives a process in one go (huge pages of 2 MiB). An allocation of 512 bytes that each product
/// leaves behind comes to more in the default run already.
const GROWTH: u64 = 8 << 20;

/// A product and what it gives on one thread.
struct Case {
    matrix: PackedMatrix,
    x: Vec<f32>,
    expected: Vec<f32>,
}

/// Products of one task and of several, of few rows and of strips, with and without a low-rank part.
fn cases(kernels: &Kernels) -> Vec<Case> {
    let pool = ThreadPool::with_threads(1);
    let mut cases = Vec::new();
    for (seed, (outputs, inputs, count, rank, precision)) in (0..).zip([
        (64, 128, 1, 0, Precision::Fast),
        (96, 200, 1, 5, Precision::Fast),
        (512, 256, 6, 0, Precision::Fast),
        (480, 256, 12, 16, Precision::Fast),
        (64, 256, 1, 0, Precision::Exact),
        (512, 128, 17, 8, Precision::Exact),
        (700, 128, 5, 0, Precision::F32),
    ]) {
        let group = GroupSize::Columns(64);
        let matrix = matrices::quantized(seed, outputs, inputs, 4, group, false, ElementType::F16, false);
        let low_rank =
            (rank > 0).then(|| Factors::Dense(ElementType::Bf16).matrices(seed + 100, outputs, inputs, rank));
        let weight = LinearWeight { low_rank, ..LinearWeight::plain(WeightMatrix::Quantized(matrix)) };
        let matrix = kernels.pack(&weight, precision, &pool).unwrap();
        let x = matrices::activations(seed, count, inputs);
        let mut expected = vec![f32::NAN; count * outputs];
        kernels.product(&matrix, &x, &mut expected, &pool);
        cases.push(Case { matrix, x, expected });
    }
    cases
}

#[test]
fn callers_that_share_a_pool_get_the_same_bits_and_leave_no_memory_behind() {
    let products = std::env::var("KINTSUGI_PRODUCTS").map_or(PRODUCTS, |count| count.parse().unwrap());
    let each = products / CALLERS;
    let kernels = Kernels::selected().unwrap();
    let pool = ThreadPool::with_threads(3);
    let cases = cases(&kernels);
    let barrier = Barrier::new(CALLERS + 1);

    let (wrong, growth) = thread::scope(|scope| {
        let callers: Vec<_> = (0..CALLERS)
            .map(|caller| {
                let (kernels, pool, cases, barrier) = (&kernels, &pool, &cases, &barrier);
                scope.spawn(move || {
                    let mut outputs: Vec<Vec<f32>> = cases.iter().map(|case| vec![0.0; case.expected.len()]).collect();
                    let mut wrong = 0;
                    // A product that panics is wrong, and the others do not wait for its thread.
                    let mut run = |range: std::ops::Range<usize>| {
                        for i in range {
                            // Callers are at different products at the same time.
                            let index = (i + 2 * caller) % cases.len();
                            let (case, y) = (&cases[index], &mut outputs[index]);
                            y.fill(f32::NAN);
                            let product = || kernels.product(&case.matrix, &case.x, y, pool);
                            let done = catch_unwind(AssertUnwindSafe(product)).is_ok();
                            let same = done && y.iter().zip(&case.expected).all(|(y, e)| y.to_bits() == e.to_bits());
                            wrong += usize::from(!same);
                        }
                    };
                    // Threads take what they need for all time during their first products.
                    run(0..each / 10);
                    barrier.wait();
                    barrier.wait();
                    run(each / 10..each);
                    barrier.wait();
                    barrier.wait();
                    wrong
                })
            })
            .collect();
        barrier.wait();
        let before = private_memory_bytes();
        barrier.wait();
        barrier.wait();
        let after = private_memory_bytes();
        barrier.wait();
        let wrong: usize = callers.into_iter().map(|caller| caller.join().unwrap()).sum();
        (wrong, before.zip(after).map(|(before, after)| after.saturating_sub(before)))
    });
    assert_eq!(wrong, 0, "of {products} products");
    // Without /proc nothing says how much memory a process has: that half is left out.
    if let Some(growth) = growth {
        assert!(growth <= GROWTH, "{growth} bytes more after {products} products");
    }
}
