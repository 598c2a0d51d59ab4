use kintsugi_linalg::KernelKMeans;
use kintsugi_runtime::{Result, ThreadPool};

use crate::svd::rank_for;
use crate::{FactorUpdate, Gauge, LinearSources, MergeMethod, MergeOptions, Solution, UnitStack};

/// LoRA-LEGO (arXiv 2409.16167): the units `[b, a]` of all adapters are clustered by k-means, and the centres are the
/// units of the result.
///
/// `√|weight · scaling|` is multiplied into both halves of a unit first (and the sign into b), so that as many clusters
/// as units give the exact weighted sum. A cluster stands for the *mean* of its members: N equal adapters give one.
/// Two reweightings, each of which can be left out: a centre gets the mean of the largest elements of its members,
/// which averaging has made smaller, and the update is multiplied by `√(reference rank / rank)`.
#[derive(Clone, Copy, Debug)]
pub struct Lego;

impl MergeMethod for Lego {
    fn name(&self) -> &'static str {
        "lego"
    }

    fn summary(&self) -> &'static str {
        "LoRA-LEGO: centres of clustered units"
    }

    fn options(&self) -> &'static [&'static str] {
        &[
            "gauge",
            "normalize",
            "parameterReweighting",
            "outputReweighting",
            "referenceRank",
            "restarts",
            "iterations",
            "seed",
        ]
    }

    fn merges_one(&self) -> bool {
        true
    }

    fn rank_of(&self, ranks: &[usize], _smaller_side: usize) -> usize {
        ranks.iter().sum()
    }

    fn solve(&self, linear: &LinearSources<'_>, options: &MergeOptions, pool: &ThreadPool) -> Result<Solution> {
        let rank = rank_for(linear, options.rank, pool)?;
        let gauged;
        let stack = match options.gauge {
            Gauge::Raw => linear.stack(),
            Gauge::Svd => {
                gauged = linear.stack().in_svd_gauge(pool)?;
                &gauged
            }
        };
        let gram = unit_gram(stack, options.normalize, pool);
        let clusters = KernelKMeans::new(&gram, stack.units(), rank, &options.k_means(), pool);
        let members = members(&clusters);
        let centres =
            pool.map(members.len(), |cluster| centre(stack, &members[cluster], options.parameter_reweighting));

        let (out_features, in_features) = (stack.out_features, stack.in_features);
        let mut update = FactorUpdate { out_features, in_features, b: Vec::new(), a: Vec::new() };
        for centre in &centres {
            update.b.extend_from_slice(&centre.b);
            update.a.extend_from_slice(&centre.a);
        }
        if options.output_reweighting {
            let reference = options.reference_rank.unwrap_or(stack.units() as f64 / stack.sources.len() as f64);
            let factor = (reference / members.len().max(1) as f64).sqrt();
            (0..members.len()).for_each(|term| update.scale_b(term, factor));
        }
        let order = by_energy(&update);
        Ok(Solution {
            update: update.reordered(&order),
            cluster_sizes: order.iter().map(|&term| members[term].len()).collect(),
            scales: order.iter().map(|&term| centres[term].scale).collect(),
        })
    }
}

/// A centre of a cluster.
struct Centre {
    b: Vec<f64>,
    a: Vec<f64>,
    scale: f64,
}

/// The mean of some units, with the parameter reweighting.
fn centre(stack: &UnitStack, members: &[usize], reweight: bool) -> Centre {
    let (out_features, in_features) = (stack.out_features, stack.in_features);
    let (mut b, mut a) = (vec![0.0; out_features], vec![0.0; in_features]);
    let mut largest = 0.0;
    for &unit in members {
        let coefficient = stack.coefficients[unit];
        let root = coefficient.abs().sqrt();
        let signed = root.copysign(coefficient);
        let mut most = 0.0f64;
        for (sum, &value) in b.iter_mut().zip(&stack.b[unit * out_features..]) {
            *sum += signed * f64::from(value);
            most = most.max(root * f64::from(value).abs());
        }
        for (sum, &value) in a.iter_mut().zip(&stack.a[unit * in_features..]) {
            *sum += root * f64::from(value);
            most = most.max(root * f64::from(value).abs());
        }
        largest += most;
    }
    let count = members.len().max(1) as f64;
    b.iter_mut().chain(a.iter_mut()).for_each(|value| *value /= count);
    let mut scale = 1.0;
    if reweight && members.len() > 1 {
        let of_mean = b.iter().chain(&a).fold(0.0f64, |most, value| most.max(value.abs()));
        // Units that cancel leave no direction that could be made larger.
        if of_mean > f64::EPSILON * largest {
            scale = largest / count / of_mean;
            b.iter_mut().chain(a.iter_mut()).for_each(|value| *value *= scale);
        }
    }
    Centre { b, a, scale }
}

/// Products of the units `[b, a]`.
fn unit_gram(stack: &UnitStack, normalize: bool, pool: &ThreadPool) -> Vec<f64> {
    let units = stack.units();
    let (gram_b, gram_a) = (stack.gram_b(pool), stack.gram_a(pool));
    let factor = |gram: &[f64], unit: usize, signed: bool| {
        let coefficient = stack.coefficients[unit];
        let norm = gram[unit * (units + 1)].sqrt();
        let size = match normalize {
            true if norm > 0.0 => 1.0 / norm,
            true => 0.0,
            false => coefficient.abs().sqrt(),
        };
        if signed { size.copysign(coefficient) } else { size }
    };
    let of_b: Vec<f64> = (0..units).map(|unit| factor(gram_b, unit, true)).collect();
    let of_a: Vec<f64> = (0..units).map(|unit| factor(gram_a, unit, false)).collect();
    (0..units * units)
        .map(|at| (at, at / units, at % units))
        .map(|(at, i, j)| of_b[i] * of_b[j] * gram_b[at] + of_a[i] * of_a[j] * gram_a[at])
        .collect()
}

/// The points of each cluster, in order.
pub(crate) fn members(clusters: &KernelKMeans) -> Vec<Vec<usize>> {
    let mut members = vec![Vec::new(); clusters.clusters];
    for (point, &cluster) in clusters.assignment.iter().enumerate() {
        members[cluster].push(point);
    }
    members
}

/// The terms from the largest to the smallest; equal ones stay in order.
pub(crate) fn by_energy(update: &FactorUpdate) -> Vec<usize> {
    let energies: Vec<f64> = (0..update.rank())
        .map(|term| {
            let (b, a) = update.norms(term);
            b * a
        })
        .collect();
    let mut order: Vec<usize> = (0..energies.len()).collect();
    order.sort_by(|&i, &j| energies[j].total_cmp(&energies[i]));
    order
}
