//! How many bits panels take for codes of each width, and that it makes no difference to products.

mod every_kernels;

use every_kernels::every_kernels;
use kintsugi_kernels::{Kernels, PackedMatrix, Precision};
use kintsugi_runtime::ThreadPool;
use kintsugi_testkit::kernel_cases::{Format, Grid, kernel_cases};
use kintsugi_testkit::matrices;
use kintsugi_weights::{ElementType, GroupSize, LinearWeight, QuantizedMatrix, QuantizedParts, WeightMatrix};

fn product_bits(kernels: &Kernels, weight: &PackedMatrix, x: &[f32], pool: &ThreadPool) -> Vec<u32> {
    let mut y = vec![f32::NAN; x.len() / weight.columns() * weight.rows()];
    kernels.product(weight, x, &mut y, pool);
    y.iter().map(|value| value.to_bits()).collect()
}

/// The same numbers in codes of more bits: moved to the middle of their range, as their zero points are.
fn widened(matrix: &QuantizedMatrix, bits: u8) -> QuantizedMatrix {
    let shift = (1u8 << (bits - 1)) - (1 << (matrix.bits() - 1));
    let parts = matrix.clone().into_parts();
    QuantizedMatrix::new(QuantizedParts {
        bits,
        codes: parts.codes.iter().map(|code| code + shift).collect(),
        zero_points: parts.zero_points.map(|zeros| zeros.iter().map(|zero| zero + shift).collect()),
        ..parts
    })
    .unwrap()
}

/// Panels of 2, 3, 5 and 6 bits and those of wider codes: the same products, whatever the steps are.
#[test]
fn narrow_codes_give_the_bits_that_wider_ones_give() {
    let pool = ThreadPool::with_threads(2);
    for case in kernel_cases() {
        let Format::Integer { bits: width @ (2 | 3 | 5 | 6), grid: Grid::Symmetric | Grid::ZeroPoints, .. } =
            case.format
        else {
            continue;
        };
        let weight = case.weight();
        let WeightMatrix::Quantized(matrix) = &weight.matrix else { panic!("codes are a quantized matrix") };
        let wide = WeightMatrix::Quantized(widened(matrix, if width <= 3 { 4 } else { 8 }));
        let wide = LinearWeight { matrix: wide, ..weight.clone() };
        let x = case.input(17);
        for kernels in every_kernels() {
            let level = kernels.level();
            for precision in [Precision::F32, Precision::Exact, Precision::Fast] {
                let [narrow, wide] = [&weight, &wide].map(|weight| kernels.pack(weight, precision, &pool).unwrap());
                assert!(narrow.memory_bytes() <= wide.memory_bytes(), "{}", case.name());
                for count in [1, 3, 17] {
                    let x = &x[..count * case.columns];
                    let [narrow, wide] = [&narrow, &wide].map(|packed| product_bits(&kernels, packed, x, &pool));
                    assert!(narrow == wide, "{}, {}, {precision:?}, {count} rows", case.name(), level.name());
                }
            }
        }
    }
}

/// Whole panels and blocks of whole steps, so that nothing is padded: the codes, their scales and zero points.
#[test]
fn codes_take_their_bits_and_no_more() {
    let pool = ThreadPool::with_threads(1);
    let kernels = Kernels::selected().unwrap();
    for width in [2, 3, 4, 5, 6, 8] {
        for (group, precision) in [(32, Precision::Fast), (64, Precision::F32), (128, Precision::Fast)] {
            let group_size = GroupSize::Columns(group);
            let matrix = matrices::quantized(1, 64, 1024, width, group_size, false, ElementType::F16, false);
            let packed = kernels.pack(&LinearWeight::plain(WeightMatrix::Quantized(matrix)), precision, &pool).unwrap();
            let stored = 64 * 1024 * usize::from(width) / 8 + 64 * 1024 / group * 3;
            let taken = packed.memory_bytes();
            assert!((stored..stored + 2048).contains(&taken), "{taken} bytes where {width} bits are {stored}");
        }
    }
}

/// Blocks that are shorter than a step of their codes take the steps of wider ones where those are fewer bytes.
#[test]
fn padding_takes_no_more_than_wider_codes_would() {
    let pool = ThreadPool::with_threads(1);
    let kernels = Kernels::selected().unwrap();
    let codes = |width, group| {
        let group_size = GroupSize::Columns(group);
        let matrix = matrices::quantized(1, 32, 480, width, group_size, true, ElementType::F32, false);
        let packed = kernels.pack(&LinearWeight::plain(WeightMatrix::Quantized(matrix)), Precision::Fast, &pool);
        // Scales, and the layout of each block.
        let other = 480 / group * (32 * 4 + size_of::<[usize; 3]>() + size_of::<u32>());
        packed.unwrap().memory_bytes() - other
    };
    // Bits of 32 rows of 480 columns.
    let bits = |width: usize| 32 * 480 / 8 * width;
    assert_eq!([3, 5, 6].map(|width| codes(width, 32)), [3, 5, 6].map(bits));
    assert_eq!([3, 5, 6].map(|width| codes(width, 16)), [4, 6, 6].map(bits));
    assert_eq!([3, 5, 6].map(|width| codes(width, 8)), [4, 8, 8].map(bits));
    // A step of 3 bits and one of 4 for 40 columns would be less, but a section has one encoding.
    assert_eq!(codes(3, 40), bits(4));
    assert_eq!(codes(3, 48), bits(4));
    assert_eq!(codes(3, 60), bits(3) / 60 * 64);
}
