use kintsugi_linalg::{MatrixView, SymmetricEigen, combine_rows, product};
use kintsugi_runtime::{Result, ThreadPool};

use crate::side_basis::SideBasis;
use crate::spectrum::{Spectrum, congruence};
use crate::{FactorUpdate, LinearSources, MergeMethod, MergeOptions, RankRule, Solution, UnitStack};

/// The best approximation of the weighted sum at a rank: its truncated singular value decomposition (Eckart and Young
/// 1936; `svd` of peft), found in the small core of the factors and never from a dense update.
///
/// With statistics of the inputs the best in their metric: the least `‖(M − T) S^½‖`, that of the outputs, as EoRA
/// (arXiv 2410.21271) finds it for a residual.
#[derive(Clone, Copy, Debug)]
pub struct Svd;

impl MergeMethod for Svd {
    fn name(&self) -> &'static str {
        "svd"
    }

    fn summary(&self) -> &'static str {
        "the closest to the weighted sum that the rank allows"
    }

    fn options(&self) -> &'static [&'static str] {
        &[]
    }

    fn merges_one(&self) -> bool {
        true
    }

    fn weighs_inputs(&self) -> bool {
        true
    }

    fn rank_of(&self, ranks: &[usize], smaller_side: usize) -> usize {
        ranks.iter().sum::<usize>().min(smaller_side)
    }

    fn solve(&self, linear: &LinearSources<'_>, options: &MergeOptions, pool: &ThreadPool) -> Result<Solution> {
        let rule = options.rank.unwrap_or(RankRule::Fixed(linear.largest_rank()));
        match linear.weighted(pool) {
            Some(weighted) => truncated_in_metric(linear.stack(), &weighted.gram, rule, pool),
            None => truncated(linear.stack(), rule, pool),
        }
        .map(Solution::plain)
    }
}

/// The truncated singular value decomposition of the sum of `stack`, both factors of a term of equal norm.
pub(crate) fn truncated(stack: &UnitStack, rule: RankRule, pool: &ThreadPool) -> Result<FactorUpdate> {
    let spectrum = Spectrum::new(stack, pool)?;
    let directions = spectrum.directions(pool)?;
    let rank = rule.pick(&directions.values, directions.energy);
    Ok(spectrum.lift(directions.balanced(rank, pool), pool))
}

/// The best approximation in the metric of the inputs: `gram` is `A S Aᵀ` of the units.
///
/// With T = B C A (C the coefficients) and B = Q L in orthonormal coordinates, the left singular vectors of `T S^½` are
/// Q times the eigenvectors U of `L C (A S Aᵀ) C Lᵀ`, and the best update is the projection `Q U Uᵀ L C A` of T: no root
/// and no inverse of S, so that inputs that no token had need no care.
fn truncated_in_metric(stack: &UnitStack, gram: &[f64], rule: RankRule, pool: &ThreadPool) -> Result<FactorUpdate> {
    let (units, out_features, in_features) = (stack.units(), stack.out_features, stack.in_features);
    let left = SideBasis::new(&stack.b, units, out_features, stack.gram_b(pool), pool)?;
    let side = left.dimension;
    let rows = left.coordinates.chunks_exact(side.max(1)).zip(&stack.coefficients);
    let scaled: Vec<f64> = rows.flat_map(|(row, factor)| row.iter().map(move |value| value * factor)).collect();
    let core = congruence(&scaled, units, side, gram, pool);
    let energy = (0..side).map(|i| core[i * (side + 1)]).sum::<f64>().max(0.0);
    let eigen = SymmetricEigen::new(&core, side)?;
    let values: Vec<f64> = eigen.values.iter().map(|value| value.max(0.0).sqrt()).collect();
    let rank = rule.pick(&values, energy).min(side);
    let mut vectors = eigen.vectors[..rank * side].to_vec();
    for vector in vectors.chunks_exact_mut(side.max(1)) {
        let largest = vector.iter().fold(0.0f64, |best, &v| if v.abs() > best.abs() { v } else { best });
        if largest < 0.0 {
            vector.iter_mut().for_each(|value| *value = -*value);
        }
    }
    let mut mixture = vec![0.0; rank * units];
    let view = MatrixView::new(&vectors, rank, side);
    product(view, MatrixView::new(&scaled, units, side).transposed(), &mut mixture, pool);
    let a = combine_rows(&mixture, rank, &stack.a, units, in_features, pool);
    let mut update = FactorUpdate { out_features, in_features, b: left.lift(&vectors, rank, pool), a };
    let norms: Vec<f64> = (0..rank).map(|term| update.norms(term).1.sqrt()).collect();
    let noise = norms.iter().fold(0.0f64, |most, &norm| most.max(norm)) * f64::EPSILON;
    let kept: Vec<usize> = (0..rank).filter(|&term| norms[term] > noise).collect();
    for &term in &kept {
        // The b have norm 1.
        let root = norms[term].sqrt();
        update.scale_both(term, 1.0 / root);
        update.scale_b(term, root * root);
    }
    Ok(update.reordered(&kept))
}

/// The number of terms that `rule` asks for.
pub(crate) fn rank_for(linear: &LinearSources<'_>, rule: Option<RankRule>, pool: &ThreadPool) -> Result<usize> {
    match rule {
        None => Ok(linear.largest_rank()),
        Some(RankRule::Fixed(rank)) => Ok(rank),
        Some(rule) => {
            let spectrum = Spectrum::new(linear.stack(), pool)?;
            let directions = spectrum.directions(pool)?;
            Ok(rule.pick(&directions.values, directions.energy))
        }
    }
}
