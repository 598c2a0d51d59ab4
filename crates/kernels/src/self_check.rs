use kintsugi_runtime::{CpuLevel, ThreadPool};
use kintsugi_weights::{
    CodeTable, DenseMatrix, DenseValues, ElementType, FactorCodes, GroupSize, LinearWeight, LowRank, QuantizedMatrix,
    QuantizedParts, WeightMatrix, reference_product,
};

use crate::{Arithmetic, Kernels, PackedMatrix, Precision};

/// One product of this machine compared with the f64 reference.
#[derive(Clone, Debug, PartialEq)]
pub struct SelfCheck {
    /// What was multiplied.
    pub case: String,
    /// With which instructions.
    pub level: CpuLevel,
    /// How precisely.
    pub precision: Precision,
    /// The largest error of an output, as a share of the sum of the sizes of its products.
    pub error: f64,
    /// The largest error that rounding explains: 2^−8 per product where activations are bf16, 1/127 where they are
    /// int8, and sums of up to a few hundred f32.
    pub budget: f64,
    /// Whether the error is within the budget.
    pub ok: bool,
}

/// Rounding of f32 sums: far above what is seen (2e-7), far below any mistake.
const F32_BUDGET: f64 = 4e-6;
/// Half a unit in the last of the 8 significant bits of bf16.
const BF16_ROUNDING: f64 = 1.0 / 256.0;
/// Half a 127th of the largest activation of a block, where the mean is half of the largest.
const INT8_ROUNDING: f64 = 1.0 / 127.0;

const ROWS: usize = 70;
const COLUMNS: usize = 300;
/// Of factors in codes: more than a panel.
const RANK: usize = 40;

/// Multiplies a handful of weights of every kind and compares with the f64 reference: what `doctor` reports.
pub fn self_check(kernels: &Kernels, pool: &ThreadPool) -> Vec<SelfCheck> {
    let mut checks = Vec::new();
    for (case, weight) in cases() {
        for precision in [Precision::F32, Precision::Exact, Precision::Fast] {
            let packed = kernels.pack(&weight, precision, pool).ok();
            // What the precision comes to: with some weights, or on some machines, less is rounded than it allows.
            let rounding = match packed.as_ref().map(|packed| kernels.arithmetic(packed)) {
                Some(Arithmetic::F32) | None => 0.0,
                Some(Arithmetic::Bf16) => BF16_ROUNDING,
                Some(Arithmetic::Int8) => INT8_ROUNDING,
            };
            let error = packed.map_or(f64::INFINITY, |packed| error(kernels, &weight, &packed, pool));
            let budget = F32_BUDGET + rounding;
            let ok = error <= budget;
            checks.push(SelfCheck { case: case.clone(), level: kernels.level(), precision, error, budget, ok });
        }
    }
    checks
}

/// The largest error over one, three and nine rows of x, of which nine are enough for strips; infinite when an output
/// is NaN.
fn error(kernels: &Kernels, weight: &LinearWeight, packed: &PackedMatrix, pool: &ThreadPool) -> f64 {
    let mut worst = 0.0f64;
    for count in [1, 3, 9] {
        let x = noise(count as u32, count * COLUMNS, 1.0);
        let mut y = vec![f32::NAN; count * ROWS];
        kernels.product(packed, &x, &mut y, pool);
        let expected = reference_product(weight, &x);
        let sizes = reference_product(&magnitudes(weight), &x.iter().map(|x| x.abs()).collect::<Vec<_>>());
        for ((y, expected), size) in y.iter().zip(expected).zip(sizes) {
            let error = (f64::from(*y) - expected).abs() / size;
            worst = worst.max(if error.is_nan() { f64::INFINITY } else { error });
        }
    }
    worst
}

/// The same Linear with the absolute value of every number: its product bounds the rounding errors.
fn magnitudes(weight: &LinearWeight) -> LinearWeight {
    let absolute = |values: &[f32]| values.iter().map(|value| value.abs()).collect::<Vec<_>>();
    LinearWeight {
        matrix: WeightMatrix::Dense(DenseMatrix::from_f32(ROWS, COLUMNS, absolute(&weight.matrix.to_f32()))),
        bias: weight.bias.as_ref().map(|bias| absolute(bias)),
        low_rank: weight.low_rank.as_ref().map(|factors| {
            let (b, a) = (absolute(factors.b()), absolute(factors.a()));
            LowRank::new(ROWS, COLUMNS, factors.rank(), b, a, ElementType::F32)
        }),
    }
}

fn cases() -> Vec<(String, LinearWeight)> {
    let mut cases = Vec::new();
    let values = noise(7, ROWS * COLUMNS, 0.1);
    for (name, dense) in [
        ("f32", DenseValues::F32(values.clone())),
        ("f16", DenseValues::F16(values.iter().map(|&value| half::f16::from_f32(value)).collect())),
        ("bf16", DenseValues::Bf16(values.iter().map(|&value| half::bf16::from_f32(value)).collect())),
    ] {
        let matrix = WeightMatrix::Dense(DenseMatrix::new(ROWS, COLUMNS, dense));
        cases.push((format!("{name} {ROWS}×{COLUMNS}"), LinearWeight::plain(matrix)));
    }
    for bits in [2, 3, 4, 5, 6, 8] {
        if let Some(matrix) = quantized(bits, ROWS, COLUMNS) {
            let matrix = WeightMatrix::Quantized(matrix);
            cases.push((format!("int{bits} group 128 {ROWS}×{COLUMNS}"), LinearWeight::plain(matrix.clone())));
            let (b, a) = (noise(8, ROWS * 5, 0.1), noise(9, 5 * COLUMNS, 0.1));
            let low_rank = Some(LowRank::new(ROWS, COLUMNS, 5, b, a, ElementType::Bf16));
            let weight = LinearWeight { matrix, bias: Some(noise(10, ROWS, 1.0)), low_rank };
            cases.push((format!("int{bits} group 128 rank 5 bias {ROWS}×{COLUMNS}"), weight));
        }
    }
    let more = |parts: Option<QuantizedParts>, name: &str| {
        let matrix = parts.and_then(|parts| QuantizedMatrix::new(parts).ok())?;
        Some((format!("{name} group 128 {ROWS}×{COLUMNS}"), LinearWeight::plain(WeightMatrix::Quantized(matrix))))
    };
    let symmetric = |rows, columns| {
        let matrix = quantized(4, rows, columns)?;
        QuantizedMatrix::new(QuantizedParts { zero_points: None, ..matrix.into_parts() }).ok()
    };
    if let (Some(matrix), Some(b), Some(a)) =
        (symmetric(ROWS, COLUMNS), symmetric(ROWS, RANK), symmetric(RANK, COLUMNS))
    {
        let low_rank = Some(LowRank::of_codes(FactorCodes { b, a }));
        let weight = LinearWeight { low_rank, ..LinearWeight::plain(WeightMatrix::Quantized(matrix)) };
        cases.push((format!("int4 group 128 rank {RANK} in int4 {ROWS}×{COLUMNS}"), weight));
    }
    let parts =
        || quantized(4, ROWS, COLUMNS).map(|matrix| QuantizedParts { zero_points: None, ..matrix.into_parts() });
    let with_offsets = parts().map(|parts| {
        let offsets = Some(noise(14, parts.scales.len(), 0.1));
        QuantizedParts { offsets, ..parts }
    });
    let with_table = parts().map(|parts| QuantizedParts { code_table: Some(CodeTable::NF4), ..parts });
    cases.extend(more(with_offsets, "int4 offsets"));
    cases.extend(more(with_table, "nf4"));
    cases
}

/// Random codes on an asymmetric grid.
fn quantized(bits: u8, rows: usize, columns: usize) -> Option<QuantizedMatrix> {
    let groups = GroupSize::Columns(128).groups(columns);
    let integers = |seed, count| -> Vec<u8> {
        noise(seed, count, 1.0).iter().map(|value| ((value + 1.0) * 128.0) as u8 >> (8 - bits)).collect()
    };
    let scales = noise(12, rows * groups, 0.1).iter().map(|scale| ElementType::F16.round(scale.abs() + 0.01)).collect();
    QuantizedMatrix::new(QuantizedParts {
        rows,
        columns,
        bits,
        group_size: GroupSize::Columns(128),
        codes: integers(11, rows * columns),
        scales,
        scale_type: ElementType::F16,
        zero_points: Some(integers(13, rows * groups)),
        ..QuantizedParts::default()
    })
    .ok()
}

/// Evenly spread values below `size`, from a linear congruence (Numerical Recipes, §7.1).
fn noise(seed: u32, count: usize, size: f32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        ((state >> 8) as f32 / (1 << 23) as f32 - 1.0) * size
    };
    (0..count).map(|_| next()).collect()
}
