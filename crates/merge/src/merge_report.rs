use kintsugi_linalg::{MatrixView, SymmetricEigen, product, row_gram, row_products, transposed};
use kintsugi_runtime::{Result, ThreadPool};
use kintsugi_weights::LowRank;
use serde::{Deserialize, Serialize};

use crate::weighted_units::measured;
use crate::{LinearSources, UnitStack};

/// Eigenvalues below this share of the largest belong to no direction.
const NOISE: f64 = 1e-12;

/// What the merge of one Linear kept. T is the exact weighted sum `Σ w ΔW`, M the merged update as stored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LinearMergeReport {
    /// `‖M − T‖ / ‖T‖` (Frobenius); `‖M‖` where T is zero. Differences below about 1e-8 are not told from zero.
    pub error: f64,
    /// `⟨M, T⟩ / (‖M‖ ‖T‖)`; `None` where either is zero.
    pub cosine: Option<f64>,
    /// `‖M‖ / ‖T‖`; `None` where T is zero.
    pub norm_ratio: Option<f64>,
    /// `‖T‖`.
    pub sum_norm: f64,
    /// `‖(M − T) S^½‖ / ‖T S^½‖`: the error of the outputs, S the second moment of the inputs. `None` without
    /// statistics, or where T gives no output.
    pub weighted_error: Option<f64>,
    /// `‖T S^½‖`; `None` without statistics.
    pub weighted_sum_norm: Option<f64>,
    /// By source, in the order that was given.
    pub sources: Vec<SourceShare>,
    /// By pair of sources `i < j`.
    pub overlaps: Vec<Overlap>,
}

/// What is left of one source.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SourceShare {
    /// Share of the energy `‖ΔW‖²` that lies in the row and column spaces of M: `‖P_B ΔW P_A‖² / ‖ΔW‖²`, in [0, 1].
    pub retained: f64,
    /// The multiple of ΔW in M: `⟨M, ΔW⟩ / ‖ΔW‖²`. The exact sum of unrelated sources has the weight here.
    pub multiple: f64,
    /// `‖ΔW‖`, its scaling included and its weight not.
    pub norm: f64,
}

/// How much two sources work in the same directions: `‖Uᵢᵀ Uⱼ‖² / min(rank)` for orthonormal bases of the spaces, in
/// [0, 1].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Overlap {
    /// One source.
    pub first: usize,
    /// The other.
    pub second: usize,
    /// Of the column spaces of the B (outputs).
    pub outputs: f64,
    /// Of the row spaces of the A (inputs).
    pub inputs: f64,
}

/// Products of the merged factors with each other and with the units of the sources.
#[derive(Debug)]
pub(crate) struct MergeProducts {
    /// `[rank, rank]`.
    b: Vec<f64>,
    a: Vec<f64>,
    /// `[rank, units]`.
    cross_b: Vec<f64>,
    pub(crate) cross_a: Vec<f64>,
    rank: usize,
}

impl MergeProducts {
    pub(crate) fn new(merged: &LowRank, stack: &UnitStack, pool: &ThreadPool) -> Self {
        let (rank, units) = (merged.rank(), stack.units());
        let (out_features, in_features) = (stack.out_features, stack.in_features);
        let columns = transposed(merged.b(), out_features, rank);
        MergeProducts {
            b: row_gram(&columns, rank, out_features, pool),
            a: row_gram(merged.a(), rank, in_features, pool),
            cross_b: row_products(&columns, rank, &stack.b, units, out_features, pool),
            cross_a: row_products(merged.a(), rank, &stack.a, units, in_features, pool),
            rank,
        }
    }

    /// The same in the metric of the inputs: products of the a are `xᵀ S y`. `None` without statistics.
    pub(crate) fn weighted(&self, merged: &LowRank, linear: &LinearSources<'_>, pool: &ThreadPool) -> Option<Self> {
        let (weighted, second_moment) = (linear.weighted(pool)?, linear.second_moment()?);
        Some(MergeProducts {
            b: self.b.clone(),
            a: measured(merged.a(), self.rank, second_moment, pool).1,
            cross_b: self.cross_b.clone(),
            cross_a: weighted.products(merged.a(), self.rank, linear.stack().units(), pool),
            rank: self.rank,
        })
    }

    /// `⟨M, Σ factorⱼ bⱼ aⱼᵀ⟩` over some units.
    fn with(&self, units: std::ops::Range<usize>, factors: &[f64]) -> f64 {
        let width = factors.len();
        let at = |term: usize, unit: usize| self.cross_b[term * width + unit] * self.cross_a[term * width + unit];
        units.map(|unit| factors[unit] * (0..self.rank).map(|term| at(term, unit)).sum::<f64>()).sum()
    }

    /// `⟨M, T⟩`.
    pub(crate) fn with_sum(&self, stack: &UnitStack) -> f64 {
        self.with(0..stack.units(), &stack.coefficients)
    }

    /// `‖M‖²`.
    pub(crate) fn energy(&self) -> f64 {
        self.b.iter().zip(&self.a).map(|(b, a)| b * a).sum()
    }

    /// `(A Aᵀ)⁺ A` times the units: `[rank, units]`, what [`crate::ScaleRule::Refit`] needs.
    pub(crate) fn solve_a(&self, units: usize, pool: &ThreadPool) -> Result<Vec<f64>> {
        let eigen = SymmetricEigen::new(&self.a, self.rank)?;
        let noise = eigen.values.first().copied().unwrap_or(0.0) * NOISE;
        let mut inverse = vec![0.0; self.rank * self.rank];
        for (&value, vector) in eigen.values.iter().zip(eigen.vectors.chunks_exact(self.rank.max(1))) {
            if value > noise {
                for (i, row) in inverse.chunks_exact_mut(self.rank).enumerate() {
                    row.iter_mut().zip(vector).for_each(|(sum, v)| *sum += vector[i] * v / value);
                }
            }
        }
        let mut out = vec![0.0; self.rank * units];
        let cross = MatrixView::new(&self.cross_a, self.rank, units);
        product(MatrixView::new(&inverse, self.rank, self.rank), cross, &mut out, pool);
        Ok(out)
    }
}

impl LinearMergeReport {
    pub(crate) fn new(
        linear: &LinearSources<'_>,
        products: &MergeProducts,
        weighted: Option<&MergeProducts>,
        pool: &ThreadPool,
    ) -> Result<Self> {
        let stack = linear.stack();
        let units = stack.units();
        let (gram_b, gram_a) = (stack.gram_b(pool), stack.gram_a(pool));
        let energy = |range, factors: &[f64]| energy_of(gram_b, gram_a, units, range, factors);
        let total = energy(0..units, &stack.coefficients);
        let outputs = weighted.zip(linear.weighted(pool)).map(|(products, units_in_metric)| {
            let total = energy_of(gram_b, &units_in_metric.gram, units, 0..units, &stack.coefficients);
            ((products.energy().max(0.0) - 2.0 * products.with_sum(stack) + total).max(0.0), total)
        });
        let (merged, common) = (products.energy().max(0.0), products.with_sum(stack));
        let wrong = (merged - 2.0 * common + total).max(0.0);

        let inside_b = whitened(&products.b, products.rank, &products.cross_b, units, pool)?;
        let inside_a = whitened(&products.a, products.rank, &products.cross_a, units, pool)?;
        let mut sources = vec![SourceShare { retained: 0.0, multiple: 0.0, norm: 0.0 }; stack.sources.len()];
        for (range, &given) in stack.sources.iter().zip(linear.given()) {
            let own = energy(range.clone(), &stack.scalings);
            if own > 0.0 {
                let kept = inner_energy(&inside_b, &inside_a, units, range.clone(), &stack.scalings);
                sources[given] = SourceShare {
                    retained: (kept / own).min(1.0),
                    multiple: products.with(range.clone(), &stack.scalings) / own,
                    norm: own.sqrt(),
                };
            }
        }
        Ok(LinearMergeReport {
            error: if total > 0.0 { (wrong / total).sqrt() } else { merged.sqrt() },
            cosine: (merged > 0.0 && total > 0.0).then(|| common / (merged.sqrt() * total.sqrt())),
            norm_ratio: (total > 0.0).then(|| (merged / total).sqrt()),
            sum_norm: total.sqrt(),
            weighted_error: outputs.filter(|(_, total)| *total > 0.0).map(|(wrong, total)| (wrong / total).sqrt()),
            weighted_sum_norm: outputs.map(|(_, total)| total.sqrt()),
            sources,
            overlaps: overlaps(linear, gram_b, gram_a)?,
        })
    }
}

/// `‖T‖` of the exact weighted sum and, with statistics of the inputs, `‖T S^½‖`.
pub fn sum_norms(linear: &LinearSources<'_>, pool: &ThreadPool) -> (f64, Option<f64>) {
    let stack = linear.stack();
    let norm = |gram_a: &[f64]| {
        energy_of(stack.gram_b(pool), gram_a, stack.units(), 0..stack.units(), &stack.coefficients).sqrt()
    };
    (norm(stack.gram_a(pool)), linear.weighted(pool).map(|weighted| norm(&weighted.gram)))
}

/// `‖Σ factorⱼ bⱼ aⱼᵀ‖²` over some units with these products `[units, units]` of their halves.
fn energy_of(gram_b: &[f64], gram_a: &[f64], units: usize, range: std::ops::Range<usize>, factors: &[f64]) -> f64 {
    let row =
        |i: usize| -> f64 { range.clone().map(|j| factors[j] * gram_b[i * units + j] * gram_a[i * units + j]).sum() };
    range.clone().map(|i| factors[i] * row(i)).sum::<f64>().max(0.0)
}

/// Coordinates `[kept, units]` of the units in an orthonormal basis of some rows: `gram` holds the products of the
/// rows, `cross` those with the units.
fn whitened(gram: &[f64], rows: usize, cross: &[f64], units: usize, pool: &ThreadPool) -> Result<Vec<f64>> {
    let eigen = SymmetricEigen::new(gram, rows)?;
    let noise = eigen.values.first().copied().unwrap_or(0.0) * NOISE;
    let kept = eigen.values.iter().take_while(|&&value| value > noise).count();
    let scaled: Vec<f64> = (0..kept * rows).map(|at| eigen.vectors[at] / eigen.values[at / rows].sqrt()).collect();
    let mut out = vec![0.0; kept * units];
    product(MatrixView::new(&scaled, kept, rows), MatrixView::new(cross, rows, units), &mut out, pool);
    Ok(out)
}

/// `‖Σ factorⱼ bⱼ aⱼᵀ‖²` of units with coordinates `[n, units]` on both sides.
fn inner_energy(b: &[f64], a: &[f64], units: usize, range: std::ops::Range<usize>, factors: &[f64]) -> f64 {
    let products =
        |rows: &[f64], i: usize, j: usize| -> f64 { rows.chunks_exact(units.max(1)).map(|row| row[i] * row[j]).sum() };
    let pairs = range.clone().flat_map(|i| range.clone().map(move |j| (i, j)));
    pairs.map(|(i, j)| factors[i] * factors[j] * products(b, i, j) * products(a, i, j)).sum::<f64>().max(0.0)
}

fn overlaps(linear: &LinearSources<'_>, gram_b: &[f64], gram_a: &[f64]) -> Result<Vec<Overlap>> {
    let stack = linear.stack();
    let bases = |gram: &[f64]| -> Result<Vec<SourceBasis>> {
        stack.sources.iter().map(|range| SourceBasis::new(gram, stack.units(), range.clone())).collect()
    };
    let (of_b, of_a) = (bases(gram_b)?, bases(gram_a)?);
    let mut overlaps = Vec::new();
    for i in 0..stack.sources.len() {
        for j in i + 1..stack.sources.len() {
            let (first, second) = (linear.given()[i], linear.given()[j]);
            overlaps.push(Overlap {
                first: first.min(second),
                second: first.max(second),
                outputs: of_b[i].overlap(&of_b[j], gram_b, stack.units()),
                inputs: of_a[i].overlap(&of_a[j], gram_a, stack.units()),
            });
        }
    }
    overlaps.sort_by_key(|overlap| (overlap.first, overlap.second));
    Ok(overlaps)
}

/// How the units of a source are combined to an orthonormal basis.
struct SourceBasis {
    range: std::ops::Range<usize>,
    kept: usize,
    /// `[kept, range]`.
    combinations: Vec<f64>,
}

impl SourceBasis {
    fn new(gram: &[f64], units: usize, range: std::ops::Range<usize>) -> Result<Self> {
        let count = range.len();
        let part: Vec<f64> = range.clone().flat_map(|i| range.clone().map(move |j| gram[i * units + j])).collect();
        let eigen = SymmetricEigen::new(&part, count)?;
        let noise = eigen.values.first().copied().unwrap_or(0.0) * NOISE;
        let kept = eigen.values.iter().take_while(|&&value| value > noise).count();
        let combinations = (0..kept * count).map(|at| eigen.vectors[at] / eigen.values[at / count].sqrt()).collect();
        Ok(SourceBasis { range, kept, combinations })
    }

    fn overlap(&self, other: &SourceBasis, gram: &[f64], units: usize) -> f64 {
        let least = self.kept.min(other.kept);
        if least == 0 {
            return 0.0;
        }
        let mut energy = 0.0;
        let mut half = vec![0.0; other.range.len()];
        for row in self.combinations.chunks_exact(self.range.len()) {
            half.fill(0.0);
            for (&factor, i) in row.iter().zip(self.range.clone()) {
                let products = &gram[i * units + other.range.start..i * units + other.range.end];
                half.iter_mut().zip(products).for_each(|(sum, value)| *sum += factor * value);
            }
            for other in other.combinations.chunks_exact(other.range.len()) {
                energy += half.iter().zip(other).map(|(a, b)| a * b).sum::<f64>().powi(2);
            }
        }
        (energy / least as f64).min(1.0)
    }
}
