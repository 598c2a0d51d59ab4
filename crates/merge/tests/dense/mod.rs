//! Adapters of a Linear with their dense updates in f64, the oracle of everything.
#![allow(dead_code, reason = "each test file uses its part")]

use kintsugi_merge::{LinearSources, MergeMethod, MergeOptions, MergeSource, MergedLinear, RankRule, merge_linear};
use kintsugi_runtime::ThreadPool;
use kintsugi_testkit::Random;
use kintsugi_weights::{ElementType, LowRank};

/// One adapter of the Linear.
#[derive(Clone, Debug)]
pub(crate) struct Adapter {
    pub(crate) factors: LowRank,
    pub(crate) scaling: f64,
    pub(crate) weight: f64,
}

impl Adapter {
    pub(crate) fn new(out: usize, input: usize, rank: usize, scaling: f64, weight: f64, seed: u64) -> Self {
        let mut random = Random::new(seed);
        // B is smaller than A, as after a training that started it at zero.
        let b = (0..out * rank).map(|_| (random.normal() * 0.02) as f32).collect();
        let a = (0..rank * input).map(|_| (random.normal() * 0.3) as f32).collect();
        Adapter { factors: LowRank::new(out, input, rank, b, a, ElementType::F32), scaling, weight }
    }

    /// The same adapter with other factors.
    pub(crate) fn with(&self, b: Vec<f32>, a: Vec<f32>) -> Self {
        let f = &self.factors;
        let factors = LowRank::new(f.out_features(), f.in_features(), f.rank(), b, a, ElementType::F32);
        Adapter { factors, ..self.clone() }
    }

    /// Its units in another order.
    pub(crate) fn reordered(&self, order: &[usize]) -> Self {
        let f = &self.factors;
        let b = f.b().chunks_exact(f.rank()).flat_map(|row| order.iter().map(|&j| row[j])).collect();
        let a = order.iter().flat_map(|&j| f.a()[j * f.in_features()..(j + 1) * f.in_features()].to_vec()).collect();
        self.with(b, a)
    }

    /// `b_j · factor_j`, `a_j / factor_j`.
    pub(crate) fn rescaled(&self, factors: &[f32]) -> Self {
        let f = &self.factors;
        let b = f.b().iter().enumerate().map(|(i, value)| value * factors[i % f.rank()]).collect();
        let a = f.a().iter().enumerate().map(|(i, value)| value / factors[i / f.in_features()]).collect();
        self.with(b, a)
    }

    /// `B Q`, `Qᵀ A` with an orthogonal Q `[r, r]`.
    pub(crate) fn rotated(&self, q: &[f64]) -> Self {
        let f = &self.factors;
        let (r, n) = (f.rank(), f.in_features());
        let mut b = vec![0.0f32; f.b().len()];
        for i in 0..f.out_features() {
            for j in 0..r {
                b[i * r + j] = (0..r).map(|l| f64::from(f.b()[i * r + l]) * q[l * r + j]).sum::<f64>() as f32;
            }
        }
        let mut a = vec![0.0f32; f.a().len()];
        for i in 0..r {
            for j in 0..n {
                a[i * n + j] = (0..r).map(|l| q[l * r + i] * f64::from(f.a()[l * n + j])).sum::<f64>() as f32;
            }
        }
        self.with(b, a)
    }

    /// `scaling · B A`.
    pub(crate) fn update(&self) -> Vec<f64> {
        dense(&self.factors).iter().map(|value| value * self.scaling).collect()
    }

    pub(crate) fn source(&self) -> MergeSource<'_> {
        MergeSource { factors: &self.factors, scaling: self.scaling, weight: self.weight }
    }
}

/// `B A`.
pub(crate) fn dense(factors: &LowRank) -> Vec<f64> {
    let (r, n) = (factors.rank(), factors.in_features());
    let mut out = vec![0.0; factors.out_features() * n];
    for (i, row) in out.chunks_exact_mut(n).enumerate() {
        for l in 0..r {
            let b = f64::from(factors.b()[i * r + l]);
            row.iter_mut().zip(&factors.a()[l * n..]).for_each(|(sum, &a)| *sum += b * f64::from(a));
        }
    }
    out
}

/// `Σ weight · scaling · B A`.
pub(crate) fn sum(adapters: &[Adapter]) -> Vec<f64> {
    let mut out = vec![0.0; adapters[0].update().len()];
    for adapter in adapters {
        out.iter_mut().zip(adapter.update()).for_each(|(sum, value)| *sum += adapter.weight * value);
    }
    out
}

pub(crate) fn norm(values: &[f64]) -> f64 {
    values.iter().map(|value| value * value).sum::<f64>().sqrt()
}

/// `‖a − b‖ / ‖b‖`.
pub(crate) fn relative(a: &[f64], b: &[f64]) -> f64 {
    let difference: Vec<f64> = a.iter().zip(b).map(|(a, b)| a - b).collect();
    norm(&difference) / norm(b)
}

pub(crate) fn merged(adapters: &[Adapter], method: &dyn MergeMethod, options: &MergeOptions) -> MergedLinear {
    merged_on(adapters, method, options, 2)
}

pub(crate) fn merged_on(
    adapters: &[Adapter],
    method: &dyn MergeMethod,
    options: &MergeOptions,
    threads: usize,
) -> MergedLinear {
    let pool = ThreadPool::with_threads(threads);
    let sources: Vec<MergeSource<'_>> = adapters.iter().map(Adapter::source).collect();
    let linear = LinearSources::new("layers.0.q_proj", &sources, adapters.len()).unwrap();
    merge_linear(method, &linear, options, &pool).unwrap()
}

/// The dense update of the merge.
pub(crate) fn update(adapters: &[Adapter], method: &dyn MergeMethod, options: &MergeOptions) -> Vec<f64> {
    dense(merged(adapters, method, options).factors.as_ref().unwrap())
}

pub(crate) fn rank(rank: usize) -> MergeOptions {
    MergeOptions { rank: Some(RankRule::Fixed(rank)), ..Default::default() }
}

/// An orthogonal matrix.
pub(crate) fn orthogonal(n: usize, seed: u64) -> Vec<f64> {
    let mut random = Random::new(seed);
    let values: Vec<f64> = (0..n * n).map(|_| random.normal()).collect();
    kintsugi_linalg::ThinQr::new(&values, n, n).q
}
