use std::ops::Range;
use std::sync::OnceLock;

use kintsugi_linalg::{LeadingDirections, row_gram, transposed};
use kintsugi_runtime::{Result, ThreadPool};

use crate::spectrum::Spectrum;
use crate::{FactorUpdate, MergeSource};

/// Minimal semantic units below each other: the sum is `Σ coefficientⱼ · bⱼ aⱼᵀ` over all units j of all sources.
///
/// A unit is a column of B with the row of A that it is multiplied with (arXiv 2409.16167). The units of a source are
/// sorted by their content, so that their order in the adapter does not matter.
#[derive(Debug)]
pub struct UnitStack {
    /// Length of a b.
    pub out_features: usize,
    /// Length of an a.
    pub in_features: usize,
    /// `[units, out]`.
    pub b: Vec<f32>,
    /// `[units, in]`.
    pub a: Vec<f32>,
    /// `[units]`: weight times scaling of the source.
    pub coefficients: Vec<f64>,
    /// `[units]`: scaling of the source.
    pub scalings: Vec<f64>,
    /// The units of each source.
    pub sources: Vec<Range<usize>>,
    gram_b: OnceLock<Vec<f64>>,
    gram_a: OnceLock<Vec<f64>>,
}

impl UnitStack {
    /// The units of `sources`, which all have one shape.
    pub(crate) fn new(sources: &[MergeSource<'_>]) -> Self {
        let (out_features, in_features) =
            sources.first().map_or((0, 0), |first| (first.factors.out_features(), first.factors.in_features()));
        let mut stack = UnitStack {
            out_features,
            in_features,
            b: Vec::new(),
            a: Vec::new(),
            coefficients: Vec::new(),
            scalings: Vec::new(),
            sources: Vec::new(),
            gram_b: OnceLock::new(),
            gram_a: OnceLock::new(),
        };
        for source in sources {
            let rank = source.factors.rank();
            let columns = transposed(source.factors.b(), out_features, rank);
            let b = |unit: usize| &columns[unit * out_features..(unit + 1) * out_features];
            let a = |unit: usize| &source.factors.a()[unit * in_features..(unit + 1) * in_features];
            let first = stack.units();
            for unit in source.unit_order() {
                stack.b.extend_from_slice(b(unit));
                stack.a.extend_from_slice(a(unit));
                stack.coefficients.push(source.coefficient());
                stack.scalings.push(source.scaling);
            }
            stack.sources.push(first..stack.units());
        }
        stack
    }

    /// Units that are terms of one sum already, with coefficient 1.
    pub(crate) fn of_update(update: &FactorUpdate) -> Self {
        let narrow = |values: &[f64]| values.iter().map(|&value| value as f32).collect();
        UnitStack {
            out_features: update.out_features,
            in_features: update.in_features,
            b: narrow(&update.b),
            a: narrow(&update.a),
            coefficients: vec![1.0; update.rank()],
            scalings: vec![1.0; update.rank()],
            sources: std::iter::once(0..update.rank()).collect(),
            gram_b: OnceLock::new(),
            gram_a: OnceLock::new(),
        }
    }

    /// Number of units.
    pub fn units(&self) -> usize {
        self.coefficients.len()
    }

    /// `[units, units]`: products of the b.
    pub fn gram_b(&self, pool: &ThreadPool) -> &[f64] {
        self.gram_b.get_or_init(|| row_gram(&self.b, self.units(), self.out_features, pool))
    }

    /// `[units, units]`: products of the a.
    pub fn gram_a(&self, pool: &ThreadPool) -> &[f64] {
        self.gram_a.get_or_init(|| row_gram(&self.a, self.units(), self.in_features, pool))
    }

    /// The units of source `index` alone.
    pub(crate) fn of_source(&self, index: usize) -> UnitStack {
        let range = self.sources[index].clone();
        UnitStack {
            out_features: self.out_features,
            in_features: self.in_features,
            b: self.b[range.start * self.out_features..range.end * self.out_features].to_vec(),
            a: self.a[range.start * self.in_features..range.end * self.in_features].to_vec(),
            coefficients: self.coefficients[range.clone()].to_vec(),
            scalings: self.scalings[range.clone()].to_vec(),
            sources: std::iter::once(0..range.len()).collect(),
            gram_b: OnceLock::new(),
            gram_a: OnceLock::new(),
        }
    }

    /// The same updates in the singular value gauge: the units of a source are the terms of the singular value
    /// decomposition of its B A, each with `‖b‖ = ‖a‖` and the component of b of the largest magnitude positive. No
    /// rotation, scaling or sign of the factors is left in them. Terms that are rounding noise are dropped.
    ///
    /// # Errors
    /// `ERR_SOLVER_FAILED`.
    pub(crate) fn in_svd_gauge(&self, pool: &ThreadPool) -> Result<UnitStack> {
        let mut stack = UnitStack {
            out_features: self.out_features,
            in_features: self.in_features,
            b: Vec::new(),
            a: Vec::new(),
            coefficients: Vec::new(),
            scalings: Vec::new(),
            sources: Vec::new(),
            gram_b: OnceLock::new(),
            gram_a: OnceLock::new(),
        };
        for (index, range) in self.sources.iter().enumerate() {
            let mut plain = self.of_source(index);
            plain.coefficients.fill(1.0);
            let spectrum = Spectrum::new(&plain, pool)?;
            let directions = LeadingDirections::new(&spectrum.core, spectrum.rows, spectrum.columns, pool)?;
            // What the eigenvalues of the squared core cannot tell from zero is noise.
            let noise = directions.values.first().copied().unwrap_or(0.0) * 1e-7;
            let rank = directions.values.iter().take_while(|&&value| value > noise).count();
            let update = spectrum.lift(directions.balanced(rank, pool), pool);
            let first = stack.units();
            for unit in 0..update.rank() {
                let b = &update.b[unit * self.out_features..(unit + 1) * self.out_features];
                let a = &update.a[unit * self.in_features..(unit + 1) * self.in_features];
                let largest = b.iter().fold(0.0f64, |best, &v| if v.abs() > best.abs() { v } else { best });
                let sign = if largest < 0.0 { -1.0 } else { 1.0 };
                stack.b.extend(b.iter().map(|value| (sign * value) as f32));
                stack.a.extend(a.iter().map(|value| (sign * value) as f32));
                stack.coefficients.push(self.coefficients[range.start]);
                stack.scalings.push(self.scalings[range.start]);
            }
            stack.sources.push(first..stack.units());
        }
        Ok(stack)
    }
}
