//! Every case of the table at every level that this machine has, in both precisions.

use kintsugi_kernels::{Kernels, PackedMatrix, Precision};
use kintsugi_runtime::{CpuLevel, ErrorCode, ThreadPool};
use kintsugi_testkit::kernel_cases::{Format, KernelCase, ROW_COUNTS, kernel_cases};
use kintsugi_weights::{DenseMatrix, ElementType, GroupAxis, LinearWeight, LowRank, WeightMatrix};

const PRECISIONS: [Precision; 2] = [Precision::F32, Precision::Exact];

fn product(kernels: &Kernels, weight: &PackedMatrix, x: &[f32], pool: &ThreadPool) -> Vec<f32> {
    let mut y = vec![f32::NAN; x.len() / weight.columns() * weight.rows()];
    kernels.product(weight, x, &mut y, pool);
    y
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// The largest error as a share of what it may be.
fn worst(y: &[f32], expected: &[f64], allowed: &[f64]) -> f64 {
    let shares = y.iter().zip(expected).zip(allowed).map(|((&y, expected), allowed)| {
        let share = (f64::from(y) - expected).abs() / allowed;
        if share.is_nan() { f64::INFINITY } else { share }
    });
    shares.fold(0.0, f64::max)
}

#[test]
fn every_case_is_within_its_budget_at_every_level() {
    let pool = ThreadPool::with_threads(2);
    let rows = *ROW_COUNTS.iter().max().unwrap();
    let mut failures = Vec::new();
    for case in kernel_cases() {
        let weight = case.weight();
        let x = case.input(rows);
        let truth = KernelCase::expected(&weight, &x, ElementType::F32);
        let truth_of_bf16 = KernelCase::expected(&weight, &x, ElementType::Bf16);
        let sums: Vec<f64> = KernelCase::magnitudes(&weight, &x)
            .iter()
            .map(|magnitude| case.budget.relative * magnitude + case.budget.absolute * case.columns as f64)
            .collect();
        let with_rounding: Vec<f64> = KernelCase::products(&weight, &x)
            .iter()
            .zip(&sums)
            .map(|(products, sums)| case.budget.activations * products + sums)
            .collect();
        for level in CpuLevel::available() {
            let kernels = Kernels::new(level).unwrap();
            for precision in PRECISIONS {
                let packed = kernels.pack(&weight, precision, &pool).unwrap();
                let y = product(&kernels, &packed, &x, &pool);
                // Rounded activations are known, so what the kernel adds to their error can be judged as strictly.
                let share = match kernels.activation_type(&packed) {
                    ElementType::Bf16 => worst(&y, &truth_of_bf16, &sums).max(worst(&y, &truth, &with_rounding)),
                    _ => worst(&y, &truth, &sums),
                };
                if share > 1.0 {
                    failures.push(format!(
                        "{}, {}, {precision:?}: {share:.2} of the budget ({})",
                        case.name(),
                        level.name(),
                        case.budget.reason
                    ));
                }
            }
        }
    }
    assert!(failures.is_empty(), "{} failures\n{}", failures.len(), failures.join("\n"));
}

#[test]
fn a_row_is_the_same_bit_for_bit_whatever_shares_its_product_and_whoever_computes_it() {
    let pools: Vec<ThreadPool> = [1, 2, 3, 7].map(ThreadPool::with_threads).into();
    let most = *ROW_COUNTS.iter().max().unwrap();
    for case in kernel_cases() {
        let weight = case.weight();
        let x = case.input(most);
        for level in CpuLevel::available() {
            let kernels = Kernels::new(level).unwrap();
            for precision in PRECISIONS {
                let packed = kernels.pack(&weight, precision, &pools[0]).unwrap();
                let whole = bits(&product(&kernels, &packed, &x, &pools[0]));
                for (count, pool) in ROW_COUNTS.iter().zip(pools.iter().cycle()) {
                    // The last rows, so that rows also move inside of their tiles.
                    let part = product(&kernels, &packed, &x[(most - count) * case.columns..], pool);
                    let place = format!("{}, {}, {precision:?}, {count} rows", case.name(), level.name());
                    assert!(bits(&part) == whole[(most - count) * case.rows..], "{place}");
                }
                for pool in &pools[1..] {
                    let place = format!("{}, {}, {precision:?}", case.name(), level.name());
                    assert!(
                        bits(&product(&kernels, &packed, &x, pool)) == whole,
                        "{place}, {} threads",
                        pool.threads()
                    );
                }
            }
        }
    }
}

#[test]
fn what_is_not_finite_stays_in_its_row_and_does_not_vanish() {
    let pool = ThreadPool::with_threads(2);
    for case in kernel_cases().into_iter().filter(|case| case.rows == 100 && case.columns >= 100) {
        let weight = case.weight();
        let clean = case.input(9);
        for level in CpuLevel::available() {
            let kernels = Kernels::new(level).unwrap();
            for precision in PRECISIONS {
                let packed = kernels.pack(&weight, precision, &pool).unwrap();
                let expected = product(&kernels, &packed, &clean, &pool);
                for (value, row, column) in [
                    (f32::NAN, 0, 0),
                    (f32::NAN, 8, case.columns - 1),
                    (f32::INFINITY, 3, 5),
                    (f32::NEG_INFINITY, 7, 99),
                ] {
                    let mut x = clean.clone();
                    x[row * case.columns + column] = value;
                    let y = product(&kernels, &packed, &x, &pool);
                    for (i, (y, expected)) in y.iter().zip(&expected).enumerate() {
                        let place =
                            || format!("{}, {}, {precision:?}, {value} in row {row}", case.name(), level.name());
                        if i / case.rows == row {
                            assert!(if value.is_nan() { y.is_nan() } else { !y.is_finite() }, "{}: {y}", place());
                        } else {
                            assert_eq!(y.to_bits(), expected.to_bits(), "{}", place());
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn a_batch_longer_than_what_is_packed_at_once_is_the_same_row_by_row() {
    let pool = ThreadPool::with_threads(2);
    let case = kernel_cases().into_iter().find(|case| case.rank > 0 && case.rows == 100 && case.columns > 100).unwrap();
    let weight = case.weight();
    let x = case.input(300);
    for level in CpuLevel::available() {
        let kernels = Kernels::new(level).unwrap();
        let packed = kernels.pack(&weight, Precision::Exact, &pool).unwrap();
        let whole = product(&kernels, &packed, &x, &pool);
        for (x, y) in x.chunks(case.columns).zip(whole.chunks(case.rows)) {
            assert_eq!(bits(&product(&kernels, &packed, x, &pool)), bits(y));
        }
    }
}

#[test]
fn adapters_add_their_product() {
    let pool = ThreadPool::with_threads(3);
    for (rank, scaling) in [(0, 1.0), (1, -0.5), (5, 2.0), (16, 0.25), (40, 1.0)] {
        for factor_type in ElementType::ALL {
            let format = Format::Dense(ElementType::F32);
            let base = KernelCase { rank, factor_type, ..kernel_cases()[0].clone() };
            let case = KernelCase { format, ..base };
            let Some(factors) = case
                .weight()
                .low_rank
                .or_else(|| (rank == 0).then(|| LowRank::new(case.rows, case.columns, 0, vec![], vec![], factor_type)))
            else {
                panic!("rank {rank} has factors");
            };
            let zeros = DenseMatrix::from_f32(case.rows, case.columns, vec![0.0; case.rows * case.columns]);
            let weight =
                LinearWeight { low_rank: Some(factors.clone()), ..LinearWeight::plain(WeightMatrix::Dense(zeros)) };
            let x = case.input(9);
            let expected = KernelCase::expected(&weight, &x, ElementType::F32);
            let magnitudes = KernelCase::magnitudes(&weight, &x);
            for level in CpuLevel::available() {
                let kernels = Kernels::new(level).unwrap();
                let packed = kernels.pack_low_rank(&factors, scaling, &pool).unwrap();
                assert_eq!(packed.rank(), rank);
                let mut y = vec![1.0f32; 9 * case.rows];
                kernels.accumulate_low_rank(&packed, &x, &mut y, &pool);
                for ((&y, expected), magnitude) in y.iter().zip(&expected).zip(&magnitudes) {
                    let expected = 1.0 + f64::from(scaling) * expected;
                    let budget = case.budget.relative * (1.0 + f64::from(scaling.abs()) * magnitude);
                    assert!((f64::from(y) - expected).abs() <= budget, "{} {y} {expected}", level.name());
                }
            }
        }
    }
}

#[test]
fn weights_that_do_not_fit_together_are_refused() {
    let pool = ThreadPool::with_threads(1);
    let kernels = Kernels::selected().unwrap();
    let matrix = |rows, columns| WeightMatrix::Dense(DenseMatrix::from_f32(rows, columns, vec![1.0; rows * columns]));
    let factors = |rows, columns| {
        Some(LowRank::new(rows, columns, 2, vec![1.0; rows * 2], vec![1.0; columns * 2], ElementType::F32))
    };
    let broken = [
        LinearWeight { bias: Some(vec![0.0; 4]), ..LinearWeight::plain(matrix(3, 5)) },
        LinearWeight { low_rank: factors(4, 5), ..LinearWeight::plain(matrix(3, 5)) },
        LinearWeight { low_rank: factors(3, 4), ..LinearWeight::plain(matrix(3, 5)) },
        LinearWeight::plain(matrix(0, 5)),
        LinearWeight::plain(matrix(3, 0)),
    ];
    for weight in broken {
        let error = kernels.pack(&weight, Precision::F32, &pool).unwrap_err();
        assert_eq!(error.code, ErrorCode::ShapeMismatch);
        assert!(!error.message.is_empty() && !error.subject.is_empty());
    }
}

#[test]
fn packed_sizes_are_those_of_the_format() {
    let pool = ThreadPool::with_threads(1);
    let kernels = Kernels::selected().unwrap();
    for case in kernel_cases().into_iter().filter(|case| case.rows == 300) {
        let weight = case.weight();
        let packed = kernels.pack(&weight, Precision::F32, &pool).unwrap();
        assert_eq!((packed.rows(), packed.columns(), packed.precision()), (300, 1100, Precision::F32));
        let stored = match &weight.matrix {
            WeightMatrix::Dense(matrix) => 300 * 1100 * matrix.element_type().bits() / 8,
            // They are widened.
            WeightMatrix::Quantized(matrix) if matrix.group_axis() == GroupAxis::Output => 300 * 1100 * 4,
            // Codes of 3 bits take 4.
            WeightMatrix::Quantized(matrix) if matrix.bits() == 3 => 300 * 1100 / 2,
            WeightMatrix::Quantized(matrix) => matrix.stored_bits() as usize / 8,
        };
        let factors = weight.low_rank.as_ref().map_or(0, |factors| factors.stored_bits() as usize / 8);
        let ratio = packed.memory_bytes() as f64 / (stored + factors) as f64;
        // 300 rows are padded to 320, the 40 rows of A to 64.
        assert!((1.0..1.4).contains(&ratio), "{}: {ratio}", case.name());
    }
}

#[test]
#[should_panic(expected = "do not fit")]
fn a_product_of_the_wrong_length_is_a_defect_of_the_caller() {
    let pool = ThreadPool::with_threads(1);
    let kernels = Kernels::selected().unwrap();
    let matrix = WeightMatrix::Dense(DenseMatrix::from_f32(2, 3, vec![1.0; 6]));
    let packed = kernels.pack(&LinearWeight::plain(matrix), Precision::F32, &pool).unwrap();
    kernels.product(&packed, &[1.0; 6], &mut [0.0; 2], &pool);
}
