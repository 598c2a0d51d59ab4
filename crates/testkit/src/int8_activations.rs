//! Activations as precision `fast` rounds them, straight from its definition and in f64.

use kintsugi_weights::{ElementType, LinearWeight, LowRank, QuantizedMatrix, WeightMatrix};

/// Longest run of columns that share a scale.
const RUN: usize = 128;

/// A quotient this close to the middle of two integers may be rounded to either.
const TIE: f64 = 1e-4;

/// Rows of x rounded to int8.
pub struct Int8Activations {
    /// What stands for x, `[count, columns]`.
    pub rounded: Vec<f32>,
    /// The step of each value whose rounding is a matter of f32 arithmetic, 0 elsewhere.
    pub undecided: Vec<f32>,
}

impl Int8Activations {
    /// Rounds `x`, `[count, columns]`, for the products with a matrix: the columns of each of its groups, in their
    /// order and in runs of up to 128, to multiples of a 127th of the largest size among them, but of no less than the
    /// smallest normal f32.
    pub fn new(matrix: &QuantizedMatrix, x: &[f32]) -> Int8Activations {
        let (columns, runs) = (matrix.columns(), runs_of(matrix));
        let mut rounded = vec![0.0; x.len()];
        let mut undecided = vec![0.0; x.len()];
        for start in (0..x.len()).step_by(columns) {
            for run in &runs {
                let largest = run.iter().map(|&column| x[start + column].abs()).fold(0.0, f32::max);
                let step = (f64::from(largest) / 127.0).max(f64::from(f32::MIN_POSITIVE));
                for &column in run {
                    let quotient = f64::from(x[start + column]) / step;
                    rounded[start + column] = (quotient.round_ties_even() * step) as f32;
                    if ((quotient - quotient.floor()) - 0.5).abs() < TIE {
                        undecided[start + column] = step as f32;
                    }
                }
            }
        }
        Int8Activations { rounded, undecided }
    }
}

/// The columns of each group in their order, in runs of up to 128.
fn runs_of(matrix: &QuantizedMatrix) -> Vec<Vec<usize>> {
    let mut runs: Vec<Vec<usize>> = Vec::new();
    for group in 0..matrix.groups() {
        let members: Vec<usize> = (0..matrix.columns()).filter(|&column| matrix.group_of(column) == group).collect();
        runs.extend(members.chunks(RUN).map(<[usize]>::to_vec));
    }
    runs
}

/// A Linear as precision `fast` multiplies with it: A of its compensation in multiples of a 127th of the largest size of each
/// row in each run of columns.
pub fn with_int8_projection(weight: &LinearWeight) -> LinearWeight {
    let (WeightMatrix::Quantized(matrix), Some(factors)) = (&weight.matrix, &weight.low_rank) else {
        return weight.clone();
    };
    let (rows, columns, rank) = (matrix.rows(), matrix.columns(), factors.rank());
    let mut a = factors.a().to_vec();
    for row in a.chunks_exact_mut(columns) {
        for run in runs_of(matrix) {
            let largest = run.iter().map(|&column| row[column].abs()).fold(0.0, f32::max);
            // In f32, as codes are: which of two codes a value in their middle becomes is no error of a product.
            let step = (largest / 127.0).max(f32::MIN_POSITIVE);
            run.iter().for_each(|&column| row[column] = (row[column] / step).round_ties_even() * step);
        }
    }
    let low_rank = LowRank::new(rows, columns, rank, factors.b().to_vec(), a, ElementType::F32);
    LinearWeight { low_rank: Some(low_rank), ..weight.clone() }
}
