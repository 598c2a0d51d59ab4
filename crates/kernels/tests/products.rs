//! Every case of the table at every level that this machine has, in every precision.

mod every_kernels;

use every_kernels::{every_kernels, every_level};
use kintsugi_kernels::{Arithmetic, Kernels, PackedMatrix, Precision};
use kintsugi_runtime::{CpuLevel, ErrorCode, ThreadPool};
use kintsugi_testkit::kernel_cases::{Factors, Format, KernelCase, ROW_COUNTS, coded_factor_cases, kernel_cases};
use kintsugi_testkit::{Int8Activations, matrices, with_int8_projection};
use kintsugi_weights::{
    DenseMatrix, ElementType, GroupAxis, GroupSize, LinearWeight, LowRank, QuantizedMatrix, QuantizedParts,
    WeightMatrix, reference_product,
};

const PRECISIONS: [Precision; 3] = [Precision::F32, Precision::Exact, Precision::Fast];

/// What factors may be made of.
const FACTORS: [Factors; 7] = [
    Factors::Dense(ElementType::F32),
    Factors::Dense(ElementType::F16),
    Factors::Dense(ElementType::Bf16),
    Factors::Codes { bits: 4, group_size: 32 },
    Factors::Codes { bits: 4, group_size: 64 },
    Factors::Codes { bits: 8, group_size: 32 },
    Factors::Codes { bits: 8, group_size: 64 },
];

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

/// What precision `fast` may make of a product.
struct Int8Reference {
    truth: Vec<f64>,
    /// The product of activations rounded by the independent reference, in f64.
    expected: Vec<f64>,
    /// How far an output may be from it: f32 sums, and where rounding an activation up or down is a matter of f32.
    allowed: Vec<f64>,
    /// Root of the summed squares of the reference's own error.
    error: f64,
}

impl Int8Reference {
    /// `None` where codes do not stand for integers.
    fn new(case: &KernelCase, weight: &LinearWeight, x: &[f32], truth: &[f64]) -> Option<Int8Reference> {
        let WeightMatrix::Quantized(matrix) = &weight.matrix else { return None };
        if !case.has_integer_codes() {
            return None;
        }
        let Int8Activations { rounded, undecided } = Int8Activations::new(matrix, x);
        let weight = &with_int8_projection(weight);
        let expected = reference_product(weight, &rounded);
        let sizes: Vec<f32> = x.iter().zip(&rounded).map(|(x, rounded)| x.abs().max(rounded.abs())).collect();
        let products = LinearWeight { bias: None, ..weight.clone() };
        let allowed: Vec<f64> = KernelCase::magnitudes(weight, &sizes)
            .iter()
            .zip(KernelCase::products(&products, &undecided))
            .map(|(magnitude, undecided)| {
                case.budget.relative * magnitude + case.budget.absolute * case.columns as f64 + undecided
            })
            .collect();
        let error = distance(&expected, truth);
        Some(Int8Reference { truth: truth.to_vec(), expected, allowed, error })
    }

    /// The larger of two shares: of the allowed distance from the reference, and of 1.1 times its error.
    fn share(&self, y: &[f32]) -> f64 {
        let error = distance(&y.iter().map(|&y| f64::from(y)).collect::<Vec<_>>(), &self.truth);
        let allowed = 1.1 * self.error + self.allowed.iter().map(|allowed| allowed * allowed).sum::<f64>().sqrt();
        let share = error / allowed;
        worst(y, &self.expected, &self.allowed).max(if share.is_nan() { f64::INFINITY } else { share })
    }
}

/// Root of the summed squares of the differences.
fn distance(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum::<f64>().sqrt()
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
        let int8 = Int8Reference::new(&case, &weight, &x, &truth);
        for kernels in every_kernels() {
            let level = kernels.level();
            for precision in PRECISIONS {
                let packed = kernels.pack(&weight, precision, &pool).unwrap();
                let y = product(&kernels, &packed, &x, &pool);
                // Rounded activations are known, so what the kernel adds to their error can be judged as strictly.
                let share = match (kernels.arithmetic(&packed), &int8) {
                    (Arithmetic::Int8, Some(int8)) => int8.share(&y),
                    (Arithmetic::Bf16, _) => worst(&y, &truth_of_bf16, &sums).max(worst(&y, &truth, &with_rounding)),
                    (Arithmetic::F32, _) => worst(&y, &truth, &sums),
                    (Arithmetic::Int8, None) => f64::INFINITY,
                };
                let int8_expected = precision == Precision::Fast && case.has_integer_codes();
                assert_eq!(kernels.arithmetic(&packed) == Arithmetic::Int8, int8_expected, "{}", case.name());
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
        for kernels in every_kernels() {
            let level = kernels.level();
            for precision in PRECISIONS {
                let packed = kernels.pack(&weight, precision, &pools[0]).unwrap();
                let whole = bits(&product(&kernels, &packed, &x, &pools[0]));
                for (count, pool) in ROW_COUNTS.iter().zip(pools.iter().cycle()) {
                    // The last rows, so that rows also move inside of their tiles.
                    let part = product(&kernels, &packed, &x[(most - count) * case.columns..], pool);
                    let place = format!("{}, {}, {precision:?}, {count} rows", case.name(), level.name());
                    assert!(bits(&part) == whole[(most - count) * case.rows..], "{place}");
                }
                // More than are packed at once: the same rows again and again.
                let many = product(&kernels, &packed, &x.repeat(4)[..130 * case.columns], &pools[1]);
                let place = format!("{}, {}, {precision:?}, 130 rows", case.name(), level.name());
                assert!(bits(&many) == whole.repeat(4)[..130 * case.rows], "{place}");
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
        for kernels in every_kernels() {
            let level = kernels.level();
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
    let dense = kernel_cases().into_iter().find(|case| case.rank > 0 && case.rows == 100 && case.columns > 100);
    // A rank of several panels with each kind of main matrix, and each kind of codes.
    let coded = coded_factor_cases().into_iter().filter(|case| case.rank == 130);
    for case in dense.into_iter().chain(coded) {
        let weight = case.weight();
        let x = case.input(300);
        for kernels in every_kernels() {
            for precision in PRECISIONS {
                let packed = kernels.pack(&weight, precision, &pool).unwrap();
                let whole = product(&kernels, &packed, &x, &pool);
                for (x, y) in x.chunks(case.columns).zip(whole.chunks(case.rows)) {
                    assert_eq!(bits(&product(&kernels, &packed, x, &pool)), bits(y), "{}", case.name());
                }
                // 130 rows: a whole pack and two more.
                let part = product(&kernels, &packed, &x[..130 * case.columns], &pool);
                assert_eq!(bits(&part), bits(&whole[..130 * case.rows]), "{}", case.name());
            }
        }
    }
}

/// A prefix cuts the codes within a group, and drops whole groups.
#[test]
fn prefixes_of_factors_are_within_the_budget_at_every_rank() {
    let pool = ThreadPool::with_threads(2);
    for case in coded_factor_cases().into_iter().filter(|case| case.rank == 130 && case.columns > 100) {
        let whole = case.weight();
        let x = case.input(9);
        for rank in [0, 1, 7, 31, 32, 33, 64, 100, 130] {
            let low_rank = whole.low_rank.as_ref().map(|factors| factors.prefix(rank));
            let weight = LinearWeight { low_rank, ..whole.clone() };
            let truth = KernelCase::expected(&weight, &x, ElementType::F32);
            let allowed: Vec<f64> = KernelCase::magnitudes(&weight, &x)
                .iter()
                .map(|magnitude| case.budget.relative * magnitude + case.budget.absolute * case.columns as f64)
                .collect();
            for kernels in every_kernels() {
                let level = kernels.level();
                let packed = kernels.pack(&weight, Precision::F32, &pool).unwrap();
                let share = worst(&product(&kernels, &packed, &x, &pool), &truth, &allowed);
                assert!(share <= 1.0, "{} prefix {rank}, {}: {share:.2} of the budget", case.name(), level.name());
            }
        }
    }
}

/// Whole panels and groups, so that nothing is padded: the codes and their scales, and little else. Beside a matrix in int8
/// A is codes of 8 bits with f32 scales in groups of that matrix.
#[test]
fn factors_of_codes_take_the_bytes_of_their_codes() {
    let pool = ThreadPool::with_threads(2);
    let kernels = Kernels::selected().unwrap();
    let (rows, columns, rank) = (320, 1024, 64);
    let matrix = matrices::quantized(1, rows, columns, 4, GroupSize::Columns(128), true, ElementType::F16, false);
    let plain = LinearWeight::plain(WeightMatrix::Quantized(matrix));
    for precision in PRECISIONS {
        let base = kernels.pack(&plain, precision, &pool).unwrap().memory_bytes();
        for factors in FACTORS {
            let factors = factors.matrices(2, rows, columns, rank);
            let stored = factors.stored_bits() as usize / 8;
            let adapter = kernels.pack_low_rank(&factors, 1.0, &pool).unwrap().memory_bytes();
            let weight = LinearWeight { low_rank: Some(factors), ..plain.clone() };
            let inside = kernels.pack(&weight, precision, &pool).unwrap().memory_bytes() - base;
            let of_b = stored * rows / (rows + columns);
            let expected = if precision == Precision::Fast { of_b + rank * columns * 33 / 32 } else { stored };
            for (taken, expected) in [(inside, expected), (adapter, stored)] {
                assert!((expected..expected + 2048).contains(&taken), "{taken} bytes where {expected} are stored");
            }
        }
    }
}

/// Sums of a block are exact, and the few float operations after them are the same at every level. Low-rank parts are
/// left out: they are sums of f32, which the scalar level rounds twice where the others have fused products.
#[test]
fn fast_products_are_the_same_bit_for_bit_at_every_level() {
    let pool = ThreadPool::with_threads(2);
    for case in kernel_cases().into_iter().filter(KernelCase::has_integer_codes) {
        let weight = LinearWeight { low_rank: None, ..case.weight() };
        let x = case.input(9);
        let multiply = |level: CpuLevel, count: usize| {
            let kernels = Kernels::new(level).unwrap();
            let packed = kernels.pack(&weight, Precision::Fast, &pool).unwrap();
            assert_eq!(kernels.arithmetic(&packed), Arithmetic::Int8);
            bits(&product(&kernels, &packed, &x[..count * case.columns], &pool))
        };
        // Unpacked in registers, and in a strip where the level has one.
        for count in [1, 9] {
            let scalar = multiply(CpuLevel::Scalar, count);
            for level in every_level() {
                assert!(multiply(level, count) == scalar, "{}, {}, {count} rows", case.name(), level.name());
            }
        }
    }
}

/// The sums that come closest to the limits of 16 and 32 bits: the largest codes with the largest activations, all of
/// one sign, and in pairs of either sign; unpacked in registers and in a strip.
#[test]
fn fast_products_do_not_saturate() {
    const COLUMNS: usize = 300;
    let pool = ThreadPool::with_threads(1);
    let signs: [fn(usize) -> f32; 4] = [
        |_| 1.0,
        |_| -1.0,
        |column| if column % 2 == 0 { 1.0 } else { -1.0 },
        |column| {
            if column / 4 % 2 == 0 { 1.0 } else { -1.0 }
        },
    ];
    // 127 is its own int8, and every product an integer.
    let x: Vec<f32> = signs
        .iter()
        .cycle()
        .take(17 + signs.len() - 1)
        .flat_map(|sign| (0..COLUMNS).map(move |column| 127.0 * sign(column)))
        .collect();
    for bits in [2, 3, 4, 5, 6, 8] {
        let largest = ((1u16 << bits) - 1) as u8;
        let rows: [fn(usize, u8) -> u8; 4] = [
            |_, largest| largest,
            |_, _| 0,
            |column, largest| if column % 2 == 0 { largest } else { 0 },
            |column, largest| if column / 4 % 2 == 0 { largest } else { 0 },
        ];
        for zero in [None, Some(0), Some(largest)] {
            let codes: Vec<u8> =
                rows.iter().flat_map(|code| (0..COLUMNS).map(move |column| code(column, largest))).collect();
            let parts = QuantizedParts {
                rows: rows.len(),
                columns: COLUMNS,
                bits,
                group_size: GroupSize::WholeRow,
                codes: codes.clone(),
                scales: vec![1.0; rows.len()],
                scale_type: ElementType::F32,
                zero_points: zero.map(|zero| vec![zero; rows.len()]),
                ..QuantizedParts::default()
            };
            let weight = LinearWeight::plain(WeightMatrix::Quantized(QuantizedMatrix::new(parts).unwrap()));
            let zero = zero.map_or(1 << (bits - 1), i64::from);
            for kernels in every_kernels() {
                let level = kernels.level();
                let packed = kernels.pack(&weight, Precision::Fast, &pool).unwrap();
                for count in [1, 3, 4, 9, 17] {
                    // Each pattern in each place of a pass.
                    for x in x.windows(count * COLUMNS).step_by(COLUMNS).take(signs.len()) {
                        let y = product(&kernels, &packed, x, &pool);
                        for (x, y) in x.chunks(COLUMNS).zip(y.chunks(rows.len())) {
                            for (codes, &y) in codes.chunks(COLUMNS).zip(y) {
                                let exact: i64 =
                                    codes.iter().zip(x).map(|(&code, &x)| (i64::from(code) - zero) * x as i64).sum();
                                let place = format!("{bits} bits, zero point {zero}, {}", level.name());
                                assert_eq!(y as i64, exact, "{place}, {count} rows");
                            }
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn what_has_no_int8_products_runs_as_exact() {
    let pool = ThreadPool::with_threads(2);
    let cases = kernel_cases().into_iter().filter(|case| !case.has_integer_codes());
    for case in cases.filter(|case| case.rows == 100) {
        let weight = case.weight();
        let x = case.input(3);
        for kernels in every_kernels() {
            let level = kernels.level();
            let [exact, fast] = [Precision::Exact, Precision::Fast].map(|precision| {
                let packed = kernels.pack(&weight, precision, &pool).unwrap();
                bits(&product(&kernels, &packed, &x, &pool))
            });
            assert!(exact == fast, "{} {}", case.name(), level.name());
        }
    }
}

#[test]
fn adapters_add_their_product() {
    let pool = ThreadPool::with_threads(3);
    for (rank, scaling) in [(0, 1.0), (1, -0.5), (5, 2.0), (16, 0.25), (40, 1.0), (130, 1.0)] {
        for kind in FACTORS {
            let case = KernelCase { format: Format::Dense(ElementType::F32), ..kernel_cases()[0].clone() };
            let factors = kind.matrices(2, case.rows, case.columns, rank);
            let zeros = DenseMatrix::from_f32(case.rows, case.columns, vec![0.0; case.rows * case.columns]);
            let weight =
                LinearWeight { low_rank: Some(factors.clone()), ..LinearWeight::plain(WeightMatrix::Dense(zeros)) };
            let x = case.input(9);
            let expected = KernelCase::expected(&weight, &x, ElementType::F32);
            let magnitudes = KernelCase::magnitudes(&weight, &x);
            for kernels in every_kernels() {
                let level = kernels.level();
                let packed = kernels.pack_low_rank(&factors, scaling, &pool).unwrap();
                assert_eq!(packed.rank(), rank);
                let mut y = vec![1.0f32; 9 * case.rows];
                kernels.accumulate_low_ranks(&[(0..9, &packed)], &x, &mut y, &pool);
                for ((&y, expected), magnitude) in y.iter().zip(&expected).zip(&magnitudes) {
                    let expected = 1.0 + f64::from(scaling) * expected;
                    let budget = case.budget.relative * (1.0 + f64::from(scaling.abs()) * magnitude);
                    let place = format!("rank {rank} {kind:?}, {}", level.name());
                    assert!((f64::from(y) - expected).abs() <= budget, "{place} {y} {expected}");
                }
            }
        }
    }
}

#[test]
fn rows_with_adapters_of_their_own_are_the_same_bit_for_bit_as_alone() {
    let pools: Vec<ThreadPool> = [1, 3].map(ThreadPool::with_threads).into();
    let (outputs, inputs) = (300, 1100);
    let bf16 = Factors::Dense(ElementType::Bf16);
    let int4 = Factors::Codes { bits: 4, group_size: 32 };
    let kinds = [(bf16, 16), (int4, 1), (int4, 40), (bf16, 0)];
    let x = matrices::activations(1, 140, inputs);
    for kernels in every_kernels() {
        let level = kernels.level();
        let packed: Vec<_> = kinds
            .iter()
            .zip(0..)
            .map(|((kind, rank), i)| {
                let factors = kind.matrices(10 * i, outputs, inputs, *rank);
                kernels.pack_low_rank(&factors, 0.5 + i as f32, &pools[0]).unwrap()
            })
            .collect();
        // Rows 3, 4 and 139 have none; the first adapter has rows in two places.
        let updates = [
            (0..2, &packed[0]),
            (2..3, &packed[1]),
            (5..134, &packed[2]),
            (134..135, &packed[3]),
            (135..139, &packed[0]),
        ];
        for pool in &pools {
            let mut y = vec![0.25; 140 * outputs];
            kernels.accumulate_low_ranks(&updates, &x, &mut y, pool);
            for row in 0..140 {
                let mut alone = vec![0.25; outputs];
                let x = &x[row * inputs..][..inputs];
                if let Some((_, update)) = updates.iter().find(|(rows, _)| rows.contains(&row)) {
                    kernels.accumulate_low_ranks(&[(0..1, update)], x, &mut alone, pool);
                }
                assert_eq!(bits(&y[row * outputs..][..outputs]), bits(&alone), "row {row}, {}", level.name());
            }
        }
    }
}

/// A of few rows shares its panel out among runs of columns, where those can be cut evenly.
#[test]
fn adapters_of_few_ranks_add_their_product_and_take_no_empty_rows() {
    let pool = ThreadPool::with_threads(3);
    let rows = 70;
    for (columns, rank, folds) in
        [(1024, 1, 4), (1024, 8, 4), (1024, 7, 4), (1022, 8, 2), (1024, 16, 2), (1023, 16, 1), (1024, 17, 1)]
    {
        for element in [ElementType::F32, ElementType::F16, ElementType::Bf16] {
            let factors = Factors::Dense(element).matrices(3, rows, columns, rank);
            let zeros = WeightMatrix::Dense(DenseMatrix::from_f32(rows, columns, vec![0.0; rows * columns]));
            let weight = LinearWeight { low_rank: Some(factors.clone()), ..LinearWeight::plain(zeros) };
            let x = matrices::activations(5, 40, columns);
            let expected = KernelCase::expected(&weight, &x, ElementType::F32);
            let magnitudes = KernelCase::magnitudes(&weight, &x);
            for kernels in every_kernels() {
                let packed = kernels.pack_low_rank(&factors, -0.5, &pool).unwrap();
                assert_eq!((packed.rank(), packed.in_features()), (rank, columns));
                let of_a = columns.div_ceil(4 * folds) * 4 * 32 * element.bits() / 8;
                let of_b = 96 * rank.next_multiple_of(4) * element.bits() / 8;
                let taken = packed.memory_bytes();
                assert!((of_a + of_b..of_a + of_b + 1024).contains(&taken), "rank {rank} of {columns}: {taken} bytes");
                let mut y = vec![1.0f32; 40 * rows];
                // Rows of it in two places, and one without.
                kernels.accumulate_low_ranks(&[(0..3, &packed), (4..40, &packed)], &x, &mut y, &pool);
                for (at, ((&y, expected), magnitude)) in y.iter().zip(&expected).zip(&magnitudes).enumerate() {
                    let scaling = if at / rows == 3 { 0.0 } else { -0.5 };
                    let distance = (f64::from(y) - (1.0 + scaling * expected)).abs();
                    let place = format!("rank {rank} of {columns}, {element:?}, {}", kernels.level().name());
                    assert!(distance <= 3e-6 * (1.0 + magnitude), "{place}: {y} beside {expected}");
                }
            }
        }
    }
}

#[test]
#[should_panic(expected = "share a row")]
fn rows_with_two_adapters_are_a_defect_of_the_caller() {
    let pool = ThreadPool::with_threads(1);
    let kernels = Kernels::selected().unwrap();
    let factors = LowRank::new(2, 3, 1, vec![1.0; 2], vec![1.0; 3], ElementType::F32);
    let packed = kernels.pack_low_rank(&factors, 1.0, &pool).unwrap();
    kernels.accumulate_low_ranks(&[(0..2, &packed), (1..3, &packed)], &[1.0; 9], &mut [0.0; 6], &pool);
}

/// Twelve inputs and eight outputs are four rows of the first and two of the second.
#[test]
#[should_panic(expected = "one shape")]
fn updates_of_different_shapes_are_a_defect_of_the_caller() {
    let pool = ThreadPool::with_threads(1);
    let kernels = Kernels::selected().unwrap();
    let packed = [(2, 3), (4, 6)].map(|(outputs, inputs)| {
        let factors = LowRank::new(outputs, inputs, 1, vec![1.0; outputs], vec![1.0; inputs], ElementType::F32);
        kernels.pack_low_rank(&factors, 1.0, &pool).unwrap()
    });
    kernels.accumulate_low_ranks(&[(0..1, &packed[0]), (1..2, &packed[1])], &[1.0; 12], &mut [0.0; 8], &pool);
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
