//! Several matrices of one input give the bits that each gives alone.

mod every_kernels;

use std::collections::BTreeMap;

use every_kernels::every_kernels;
use kintsugi_kernels::{Kernels, PackedMatrix, Precision};
use kintsugi_runtime::ThreadPool;
use kintsugi_testkit::kernel_cases::{Factors, KernelCase, kernel_cases};
use kintsugi_testkit::matrices;
use kintsugi_weights::{ElementType, FactorCodes, GroupSize, LinearWeight, LowRank, WeightMatrix};

const PRECISIONS: [Precision; 3] = [Precision::F32, Precision::Exact, Precision::Fast];

/// Few rows, many, and more than are packed at once.
const COUNTS: [usize; 5] = [1, 3, 8, 33, 150];

/// The products of one call, and of one call for each.
fn together_and_alone(
    kernels: &Kernels,
    weights: &[&PackedMatrix],
    x: &[f32],
    pool: &ThreadPool,
) -> [Vec<Vec<u32>>; 2] {
    let count = x.len() / weights[0].columns();
    let outputs = || -> Vec<Vec<f32>> { weights.iter().map(|weight| vec![f32::NAN; count * weight.rows()]).collect() };
    let (mut together, mut alone) = (outputs(), outputs());
    let mut slices: Vec<&mut [f32]> = together.iter_mut().map(Vec::as_mut_slice).collect();
    kernels.products(weights, x, &mut slices, pool);
    for (weight, y) in weights.iter().zip(&mut alone) {
        kernels.product(weight, x, y, pool);
    }
    [together, alone].map(|all| all.iter().map(|y| y.iter().map(|y| y.to_bits()).collect()).collect())
}

#[test]
fn matrices_of_one_input_are_the_same_bit_for_bit_together_and_alone() {
    let pools = [1, 3].map(ThreadPool::with_threads);
    let mut by_width: BTreeMap<usize, Vec<KernelCase>> = BTreeMap::new();
    for case in kernel_cases() {
        by_width.entry(case.columns).or_default().push(case);
    }
    let groups: Vec<Vec<KernelCase>> =
        by_width.into_values().flat_map(|cases| cases.chunks(5).map(<[_]>::to_vec).collect::<Vec<_>>()).collect();
    assert!(groups.iter().filter(|group| group.len() > 1).count() > 5, "there are widths that several cases have");
    for group in groups {
        let weights: Vec<LinearWeight> = group.iter().map(KernelCase::weight).collect();
        for kernels in every_kernels() {
            for precision in PRECISIONS {
                let packed: Vec<PackedMatrix> =
                    weights.iter().map(|weight| kernels.pack(weight, precision, &pools[0]).unwrap()).collect();
                let packed: Vec<&PackedMatrix> = packed.iter().collect();
                for (count, pool) in COUNTS.into_iter().zip(pools.iter().cycle()) {
                    let [together, alone] = together_and_alone(&kernels, &packed, &group[0].input(count), pool);
                    let names: Vec<String> = group.iter().map(KernelCase::name).collect();
                    let level = kernels.level().name();
                    assert!(together == alone, "{}, {level}, {precision:?}, {count} rows", names.join(" + "));
                }
            }
        }
    }
}

/// Three updates with one A.
fn updates_of_one_projection(kind: Factors, outputs: [usize; 3], inputs: usize, rank: usize) -> Vec<LowRank> {
    let first = kind.matrices(1, outputs[0], inputs, rank);
    let of = |(seed, &outputs): (u64, &usize)| {
        let other = kind.matrices(seed, outputs, inputs, rank);
        match (first.codes(), other.codes()) {
            (Some(first), Some(other)) => LowRank::of_codes(FactorCodes { b: other.b.clone(), a: first.a.clone() }),
            _ => {
                let (b, a) = (other.b().to_vec(), first.a().to_vec());
                LowRank::new(outputs, inputs, rank, b, a, first.factor_type())
            }
        }
    };
    (2u64..).zip(&outputs).map(of).collect()
}

#[test]
fn a_shared_projection_is_kept_once_and_changes_no_bit() {
    let pools = [1, 3].map(ThreadPool::with_threads);
    let (outputs, inputs, rank) = ([160, 64, 33], 300, 24);
    let x = matrices::activations(3, 150, inputs);
    for kind in [Factors::Dense(ElementType::Bf16), Factors::Codes { bits: 4, group_size: 32 }] {
        let updates = updates_of_one_projection(kind, outputs, inputs, rank);
        let weights: Vec<LinearWeight> = updates
            .iter()
            .map(|update| {
                let case =
                    KernelCase { rows: update.out_features(), columns: inputs, rank: 0, ..kernel_cases()[3].clone() };
                LinearWeight { low_rank: Some(update.clone()), bias: None, ..case.weight() }
            })
            .collect();
        for kernels in every_kernels() {
            for precision in PRECISIONS {
                let apart: Vec<PackedMatrix> =
                    weights.iter().map(|weight| kernels.pack(weight, precision, &pools[0]).unwrap()).collect();
                let mut shared = apart.clone();
                let (first, others) = shared.split_at_mut(1);
                others.iter_mut().for_each(|other| other.share_projection(&first[0]));
                let bytes = |all: &[PackedMatrix]| all.iter().map(PackedMatrix::memory_bytes).sum::<usize>();
                let saved = bytes(&apart) - bytes(&shared);
                let stored = usize::try_from(updates[0].stored_bits() / 8).unwrap() * inputs / (inputs + outputs[0]);
                // Beside a matrix in int8 A is bytes.
                let least = 2 * if precision == Precision::Fast { rank * inputs } else { stored };
                assert!(saved > least * 9 / 10, "{kind:?}: {saved} of {least}");
                for (count, pool) in COUNTS.into_iter().zip(pools.iter().cycle()) {
                    let x = &x[..count * inputs];
                    let [_, expected] = together_and_alone(&kernels, &apart.iter().collect::<Vec<_>>(), x, pool);
                    let [found, _] = together_and_alone(&kernels, &shared.iter().collect::<Vec<_>>(), x, pool);
                    let level = kernels.level().name();
                    assert!(found == expected, "{kind:?}, {level}, {precision:?}, {count} rows");
                }
            }
        }
    }
}

/// In precision `fast` A lies in the blocks of its matrix.
#[test]
fn a_projection_of_matrices_in_other_groups_is_kept_for_each_in_fast_and_changes_no_bit() {
    let pool = ThreadPool::with_threads(2);
    let factors = Factors::Dense(ElementType::Bf16).matrices(1, 64, 256, 8);
    let x = matrices::activations(3, 40, 256);
    for kernels in every_kernels() {
        for (precision, shared) in [(Precision::F32, true), (Precision::Fast, false)] {
            let packed = [32, 128].map(|group| {
                let group = GroupSize::Columns(group);
                let matrix = matrices::quantized(2, 64, 256, 4, group, true, ElementType::F16, false);
                let plain = LinearWeight::plain(WeightMatrix::Quantized(matrix));
                kernels.pack(&LinearWeight { low_rank: Some(factors.clone()), ..plain }, precision, &pool).unwrap()
            });
            let [first, mut second] = packed;
            let bytes = second.memory_bytes();
            second.share_projection(&first);
            assert_eq!(second.memory_bytes() < bytes, shared, "{precision:?}");
            for count in COUNTS.into_iter().filter(|&count| count <= 40) {
                let [together, alone] = together_and_alone(&kernels, &[&first, &second], &x[..count * 256], &pool);
                assert!(together == alone, "{}, {precision:?}, {count} rows", kernels.level().name());
            }
        }
    }
}

#[test]
fn what_differs_is_not_shared() {
    let pool = ThreadPool::with_threads(1);
    let kernels = Kernels::selected().unwrap();
    let bf16 = Factors::Dense(ElementType::Bf16);
    let pack = |factors: Option<LowRank>| {
        let case = KernelCase { rows: 64, columns: 300, rank: 0, ..kernel_cases()[3].clone() };
        kernels.pack(&LinearWeight { low_rank: factors, ..case.weight() }, Precision::F32, &pool).unwrap()
    };
    let first = pack(Some(bf16.matrices(1, 64, 300, 8)));
    for other in [Some(bf16.matrices(2, 64, 300, 8)), Some(bf16.matrices(1, 64, 300, 8).prefix(4)), None] {
        let (mut shared, apart) = (pack(other.clone()), pack(other));
        shared.share_projection(&first);
        assert_eq!(shared.memory_bytes(), apart.memory_bytes());
    }
}

#[test]
#[should_panic(expected = "as wide")]
fn matrices_of_different_widths_are_a_defect_of_the_caller() {
    let pool = ThreadPool::with_threads(1);
    let kernels = Kernels::selected().unwrap();
    let pack = |(rows, columns)| {
        let case = KernelCase { rows, columns, rank: 0, ..kernel_cases()[0].clone() };
        kernels.pack(&case.weight(), Precision::F32, &pool).unwrap()
    };
    let (wide, narrow) = (pack((4, 6)), pack((2, 3)));
    kernels.products(&[&wide, &narrow], &[1.0; 12], &mut [&mut [0.0; 8], &mut [0.0; 8]], &pool);
}
