use kintsugi_linalg::{SymmetricEigen, combine_rows};
use kintsugi_runtime::{Result, ThreadPool};

use crate::svd::truncated;
use crate::{FactorUpdate, LinearSources, MergeMethod, MergeOptions, RankRule, Solution, UnitStack};

/// TSV-M, task singular vectors (arXiv 2412.00081): the leading singular directions of each update, of which every
/// adapter gets an equal part of the space, made orthogonal to those of the others (the nearest orthonormal vectors,
/// on both sides), with their singular values. The rule looks the same in the coordinates of Core Space, because it
/// commutes with rotations.
#[derive(Clone, Copy, Debug)]
pub struct Tsv;

impl MergeMethod for Tsv {
    fn name(&self) -> &'static str {
        "tsv"
    }

    fn summary(&self) -> &'static str {
        "singular directions of all adapters, made orthogonal to each other"
    }

    fn options(&self) -> &'static [&'static str] {
        &[]
    }

    fn rank_of(&self, ranks: &[usize], smaller_side: usize) -> usize {
        ranks.iter().sum::<usize>().min(smaller_side)
    }

    fn solve(&self, linear: &LinearSources<'_>, options: &MergeOptions, pool: &ThreadPool) -> Result<Solution> {
        let stack = linear.stack().in_svd_gauge(pool)?;
        let (out_features, in_features) = (stack.out_features, stack.in_features);
        let part = (out_features.min(in_features) / stack.sources.len()).max(1);
        let kept: Vec<usize> = stack.sources.iter().flat_map(|range| range.clone().take(part)).collect();
        let units = kept.len();
        let take = |values: &[f32], width: usize| -> Vec<f32> {
            kept.iter().flat_map(|&i| unit(&values[i * width..(i + 1) * width])).collect()
        };
        let (left, right) = (take(&stack.b, out_features), take(&stack.a, in_features));
        let mut update = FactorUpdate {
            out_features,
            in_features,
            b: nearest_orthonormal(&left, units, out_features, pool)?,
            a: nearest_orthonormal(&right, units, in_features, pool)?,
        };
        for (term, &i) in kept.iter().enumerate() {
            // ‖b‖ = ‖a‖ = √σ in this gauge.
            let value: f64 =
                stack.b[i * out_features..(i + 1) * out_features].iter().map(|&v| f64::from(v).powi(2)).sum();
            let coefficient = value * stack.coefficients[i];
            let root = coefficient.abs().sqrt();
            update.scale_both(term, root);
            if coefficient < 0.0 {
                update.scale_b(term, -1.0);
            }
        }
        let rule = options.rank.unwrap_or(RankRule::Fixed(linear.largest_rank()));
        truncated(&UnitStack::of_update(&update), rule, pool).map(Solution::plain)
    }
}

fn unit(values: &[f32]) -> Vec<f32> {
    let norm = values.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>().sqrt();
    values.iter().map(|&value| if norm > 0.0 { (f64::from(value) / norm) as f32 } else { 0.0 }).collect()
}

/// `(X Xᵀ)^−½ X`: the orthonormal rows nearest to those of X (`[units, width]`). Combinations that vanish stay so.
fn nearest_orthonormal(x: &[f32], units: usize, width: usize, pool: &ThreadPool) -> Result<Vec<f64>> {
    let eigen = SymmetricEigen::new(&kintsugi_linalg::row_gram(x, units, width, pool), units)?;
    let noise = eigen.values.first().copied().unwrap_or(0.0) * 1e-10;
    let mut root = vec![0.0; units * units];
    for (&value, vector) in eigen.values.iter().zip(eigen.vectors.chunks_exact(units.max(1))) {
        if value > noise {
            for (i, row) in root.chunks_exact_mut(units).enumerate() {
                let factor = vector[i] / value.sqrt();
                row.iter_mut().zip(vector).for_each(|(sum, v)| *sum += factor * v);
            }
        }
    }
    Ok(combine_rows(&root, units, x, units, width, pool))
}
