use kintsugi_linalg::combine_rows;
use kintsugi_runtime::{Result, ThreadPool};
use kintsugi_weights::LowRank;

use crate::merge_method::check_statistics;
use crate::merge_report::MergeProducts;
use crate::stored_cat::beyond;
use crate::{LinearMergeReport, LinearSources, MergeMethod, MergeOptions, RankRule, ScaleRule, Solution, Svd};

/// The merged factors of one Linear.
#[derive(Clone, Debug)]
pub struct MergedLinear {
    /// Factors with scaling 1; `None` where nothing is left.
    pub factors: Option<LowRank>,
    /// Clustering methods: the number of units behind each term.
    pub cluster_sizes: Vec<usize>,
    /// Clustering methods: what each centre was multiplied with.
    pub scales: Vec<f64>,
    /// What [`ScaleRule::ClosedForm`] multiplied the update with, else 1.
    pub scale: f64,
    /// What was kept, where it was asked for.
    pub report: Option<LinearMergeReport>,
}

/// Merges what several adapters have for one Linear.
///
/// With statistics of the inputs ([`LinearSources::weighted_by`]) methods that weigh inputs, the closed-form scale, the
/// best B and the report use the metric of the outputs, `‖(M − T) S^½‖`.
///
/// A single adapter has nothing to merge with: methods that need several leave it as it is, or cut it to the rank.
///
/// # Errors
/// Those of [`MergeMethod::solve`] and [`MergeOptions::validate`]; `ERR_VALUE_NOT_FINITE` when the type of the factors
/// cannot hold them.
pub fn merge_linear(
    method: &dyn MergeMethod,
    linear: &LinearSources<'_>,
    options: &MergeOptions,
    pool: &ThreadPool,
) -> Result<MergedLinear> {
    options.validate()?;
    if linear.second_moment().is_some() {
        check_statistics(method, options.scale)?;
    }
    let cut = match options.rank {
        Some(RankRule::Fixed(rank)) => rank < linear.largest_rank(),
        Some(RankRule::Energy { .. }) => true,
        None => false,
    };
    let by_svd = linear.alone() && (!method.merges_one() || (cut && method.keeps_rank()));
    let method = if by_svd { &Svd } else { method };
    let (factors, cluster_sizes, scales, scale) = match method.factors(linear, options.factor_type) {
        Some(factors) => (factors, Vec::new(), Vec::new(), 1.0),
        None => solve(method, linear, options, pool)?,
    };
    if !factors.b().iter().chain(factors.a()).all(|value| value.is_finite()) {
        return Err(beyond(linear.name(), options.factor_type));
    }
    let report = match options.report {
        true => {
            let products = MergeProducts::new(&factors, linear.stack(), pool);
            let weighted = products.weighted(&factors, linear, pool);
            Some(LinearMergeReport::new(linear, &products, weighted.as_ref(), pool)?)
        }
        false => None,
    };
    let factors = (factors.rank() > 0).then_some(factors);
    Ok(MergedLinear { factors, cluster_sizes, scales, scale, report })
}

/// Below this share of the most that it could be, the energy of an update in a metric is rounding noise.
const NOISE: f64 = 1e-12;

/// The rounded factors, sizes and scales of clusters, and the closed-form scale.
fn solve(
    method: &dyn MergeMethod,
    linear: &LinearSources<'_>,
    options: &MergeOptions,
    pool: &ThreadPool,
) -> Result<(LowRank, Vec<usize>, Vec<f64>, f64)> {
    let Solution { mut update, cluster_sizes, scales } = method.solve(linear, options, pool)?;
    let mut scale = 1.0;
    if update.rank() > 0 && options.scale != ScaleRule::Method {
        let merged = update.to_low_rank(kintsugi_weights::ElementType::F32);
        let plain = MergeProducts::new(&merged, linear.stack(), pool);
        // The most that the metric can make of the energy: ‖M S^½‖² ≤ tr(S) ‖M‖².
        let trace: f64 = linear.second_moment().map_or(1.0, |second_moment| second_moment.diagonal().iter().sum());
        let most = plain.energy() * trace;
        let products = plain.weighted(&merged, linear, pool).unwrap_or(plain);
        match options.scale {
            ScaleRule::ClosedForm => {
                let energy = products.energy();
                // What is less gives no output but rounding noise.
                if energy > NOISE * most {
                    scale = products.with_sum(linear.stack()) / energy;
                    (0..update.rank()).for_each(|term| update.scale_b(term, scale));
                }
            }
            ScaleRule::Refit => {
                let stack = linear.stack();
                let mut sums = products.solve_a(stack.units(), pool)?;
                for row in sums.chunks_exact_mut(stack.units().max(1)) {
                    row.iter_mut().zip(&stack.coefficients).for_each(|(value, factor)| *value *= factor);
                }
                update.b = combine_rows(&sums, update.rank(), &stack.b, stack.units(), stack.out_features, pool);
            }
            ScaleRule::Method => {}
        }
    }
    Ok((update.to_low_rank(options.factor_type), cluster_sizes, scales, scale))
}
