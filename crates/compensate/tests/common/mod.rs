//! What the tests of the compensation share: cases with everything that their oracles need.

use kintsugi_calibration::{Calibration, CalibrationBuilder};
use kintsugi_compensate::{Compensation, CompensationOptions, Exact, FactorPrecision, compensate};
use kintsugi_runtime::{Result, ThreadPool};
use kintsugi_testkit::eora_cases::{EoraCase, EoraInstance, outputs, singular_values};
use kintsugi_weights::{DenseMatrix, ElementType, LowRank, QuantizedMatrix};

pub(crate) fn calibrate(inputs: &[f32], width: usize) -> Calibration {
    let pool = ThreadPool::global();
    let mut builder = CalibrationBuilder::new(width);
    builder.push(inputs, pool).unwrap();
    builder.finish(pool)
}

pub(crate) fn residual(instance: &EoraInstance) -> Vec<f64> {
    let pairs = instance.weight.to_f32().into_iter().zip(instance.quantized.to_f32());
    pairs.map(|(a, b)| f64::from(a) - f64::from(b)).collect()
}

/// `Δ − B A` in f64.
pub(crate) fn repaired(delta: &[f64], factors: &LowRank) -> Vec<f64> {
    let (rank, columns) = (factors.rank(), factors.in_features());
    let mut out = delta.to_vec();
    for (row, out) in out.chunks_exact_mut(columns).enumerate() {
        for l in 0..rank {
            let b = f64::from(factors.b()[row * rank + l]);
            for (value, &a) in out.iter_mut().zip(&factors.a()[l * columns..(l + 1) * columns]) {
                *value -= b * f64::from(a);
            }
        }
    }
    out
}

/// `|B| |A| |x|` for every input: what the rounding errors of the factors are multiplied with.
pub(crate) fn magnitudes(factors: &LowRank, inputs: &[f32]) -> Vec<f64> {
    let absolute = |values: &[f32]| values.iter().map(|value| f64::from(value.abs())).collect::<Vec<_>>();
    let (b, a, rank) = (absolute(factors.b()), absolute(factors.a()), factors.rank());
    let inputs: Vec<f32> = inputs.iter().map(|value| value.abs()).collect();
    let projected = outputs(&a, factors.in_features(), &inputs);
    let tokens = inputs.len() / factors.in_features();
    let row = |row: usize, token: usize| (0..rank).map(|l| b[row * rank + l] * projected[l * tokens + token]).sum();
    (0..factors.out_features()).flat_map(|i| (0..tokens).map(move |token| (i, token))).map(|(i, t)| row(i, t)).collect()
}

pub(crate) fn norm(values: &[f64]) -> f64 {
    values.iter().map(|v| v * v).sum::<f64>().sqrt()
}

pub(crate) fn options(rank: usize, factor_type: ElementType) -> CompensationOptions {
    CompensationOptions { method: &Exact, rank, precision: FactorPrecision::Float(factor_type), affine: false }
}

pub(crate) fn eora(
    weight: &DenseMatrix,
    quantized: &QuantizedMatrix,
    calibration: &Calibration,
    options: &CompensationOptions,
    pool: &ThreadPool,
) -> Result<Compensation> {
    compensate(weight, quantized, calibration, None, None, options, pool)
}

/// A case and everything that its oracles need.
pub(crate) struct Solvable {
    pub(crate) instance: EoraInstance,
    pub(crate) calibration: Calibration,
    pub(crate) delta: Vec<f64>,
    /// `‖Δ X‖`
    pub(crate) total: f64,
    pub(crate) shape: (usize, usize),
}

impl Solvable {
    pub(crate) fn new(case: &EoraCase) -> Self {
        let instance = case.instance();
        let calibration = calibrate(&instance.inputs, case.columns);
        let delta = residual(&instance);
        let spoiled = outputs(&delta, case.columns, &instance.inputs);
        Solvable { instance, calibration, total: norm(&spoiled), delta, shape: (case.rows, case.columns) }
    }

    /// Singular values of `Δ X`.
    pub(crate) fn values(&self) -> Vec<f64> {
        let (rows, columns) = self.shape;
        let spoiled = outputs(&self.delta, columns, &self.instance.inputs);
        singular_values(&spoiled, rows, self.instance.inputs.len() / columns)
    }

    pub(crate) fn optimum(&self, rank: usize) -> f64 {
        let values = self.values();
        norm(&values[rank.min(values.len())..])
    }

    pub(crate) fn solve(&self, options: &CompensationOptions) -> Compensation {
        let (instance, pool) = (&self.instance, ThreadPool::global());
        eora(&instance.weight, &instance.quantized, &self.calibration, options, pool).unwrap()
    }

    /// `‖(Δ − B A) X‖`, measured on the inputs.
    pub(crate) fn left(&self, factors: Option<&LowRank>) -> f64 {
        let Some(factors) = factors else { return self.total };
        norm(&outputs(&repaired(&self.delta, factors), factors.in_features(), &self.instance.inputs))
    }
}
