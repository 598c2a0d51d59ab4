use kintsugi_linalg::{KernelKMeans, MatrixView, MatrixViewMut, SymmetricEigen, ThinSvd, add_product};
use kintsugi_runtime::{Result, ThreadPool};

use crate::lego::{by_energy, members};
use crate::svd::rank_for;
use crate::{FactorUpdate, Gauge, LinearSources, MergeMethod, MergeOptions, Solution, UnitStack};

/// LEGO on updates instead of factors: the distance of two units is that of the matrices `b aᵀ`, whose products are
/// `(bᵢ·bⱼ)(aᵢ·aⱼ)`, and a cluster becomes the best rank-1 matrix for the *sum* of its members.
///
/// Signs and scales that move between the halves of a unit change nothing; with the singular value gauge, rotations of
/// the factors of an adapter do not either. As many clusters as units give the exact weighted sum. The method is this
/// project's own.
#[derive(Clone, Copy, Debug)]
pub struct GaugeFreeLego;

impl MergeMethod for GaugeFreeLego {
    fn name(&self) -> &'static str {
        "lego-gauge-free"
    }

    fn summary(&self) -> &'static str {
        "clusters of rank-1 updates, each summed to the best rank-1 update"
    }

    fn options(&self) -> &'static [&'static str] {
        &["gauge", "restarts", "iterations", "seed"]
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
        let units = stack.units();
        let (gram_b, gram_a, d) = (stack.gram_b(pool), stack.gram_a(pool), &stack.coefficients);
        let product = |i: usize, j: usize| d[i] * d[j] * gram_b[i * units + j] * gram_a[i * units + j];
        // The order decides the seeds of k-means, so it must not depend on signs and scales either.
        let mut order: Vec<usize> = (0..units).collect();
        order.sort_by(|&i, &j| product(j, j).total_cmp(&product(i, i)));
        let kernel: Vec<f64> =
            order.iter().flat_map(|&i| order.iter().map(move |&j| (i, j))).map(|(i, j)| product(i, j)).collect();
        let clusters = KernelKMeans::new(&kernel, units, rank, &options.k_means(), pool);
        let members: Vec<Vec<usize>> =
            members(&clusters).iter().map(|points| points.iter().map(|&point| order[point]).collect()).collect();
        let terms = pool.map(members.len(), |cluster| best_term(stack, &members[cluster], gram_b, gram_a));

        let mut update = FactorUpdate {
            out_features: stack.out_features,
            in_features: stack.in_features,
            b: Vec::new(),
            a: Vec::new(),
        };
        for term in terms {
            let (b, a) = term?;
            update.b.extend(b);
            update.a.extend(a);
        }
        let order = by_energy(&update);
        Ok(Solution {
            update: update.reordered(&order),
            cluster_sizes: order.iter().map(|&term| members[term].len()).collect(),
            scales: Vec::new(),
        })
    }
}

/// The best rank-1 update for the weighted sum of some units, both halves of equal norm. A single unit stays itself.
fn best_term(stack: &UnitStack, members: &[usize], gram_b: &[f64], gram_a: &[f64]) -> Result<(Vec<f64>, Vec<f64>)> {
    let d = |unit: usize| stack.coefficients[unit];
    if let &[unit] = members {
        let root = d(unit).abs().sqrt();
        return Ok((
            weighted_sum(&stack.b, stack.out_features, members, &[root.copysign(d(unit))]),
            weighted_sum(&stack.a, stack.in_features, members, &[root]),
        ));
    }
    let count = members.len();
    let b = Whitened::new(gram_b, stack.units(), members)?;
    let a = Whitened::new(gram_a, stack.units(), members)?;
    // The sum in orthonormal coordinates of its members: C_Bᵀ D C_A.
    let weighted: Vec<f64> = (0..b.kept * count).map(|at| b.coordinates[at] * d(members[at % count])).collect();
    let mut core = vec![0.0; b.kept * a.kept];
    let right = MatrixView::new(&a.coordinates, a.kept, count);
    let out = MatrixViewMut::new(&mut core, b.kept, a.kept);
    add_product(out, MatrixView::new(&weighted, b.kept, count), right.transposed());
    let svd = ThinSvd::new(&core, b.kept, a.kept)?;
    let root = svd.values.first().copied().unwrap_or(0.0).sqrt();
    Ok((
        weighted_sum(&stack.b, stack.out_features, members, &b.coefficients(&svd.left, root)),
        weighted_sum(&stack.a, stack.in_features, members, &a.coefficients(&svd.right, root)),
    ))
}

/// Some rows in an orthonormal basis of what they span, known by their products.
struct Whitened {
    kept: usize,
    values: Vec<f64>,
    /// `[kept, count]`: eigenvectors of the products.
    vectors: Vec<f64>,
    /// `[kept, count]`: coordinate by member.
    coordinates: Vec<f64>,
}

impl Whitened {
    fn new(gram: &[f64], units: usize, members: &[usize]) -> Result<Self> {
        let count = members.len();
        let part: Vec<f64> = members.iter().flat_map(|&i| members.iter().map(move |&j| gram[i * units + j])).collect();
        let eigen = SymmetricEigen::new(&part, count)?;
        let noise = eigen.values.first().copied().unwrap_or(0.0) * f64::EPSILON * count as f64;
        let kept = eigen.values.iter().take_while(|&&value| value > noise).count();
        let vectors = eigen.vectors[..kept * count].to_vec();
        let coordinates = (0..kept * count).map(|at| vectors[at] * eigen.values[at / count].sqrt()).collect();
        Ok(Whitened { kept, values: eigen.values[..kept].to_vec(), vectors, coordinates })
    }

    /// How the members are summed to `size` times the vector with these coordinates.
    fn coefficients(&self, vector: &[f64], size: f64) -> Vec<f64> {
        let count = self.vectors.len().checked_div(self.kept).unwrap_or(0);
        let mut out = vec![0.0; count];
        for ((row, &value), &coordinate) in self.vectors.chunks_exact(count.max(1)).zip(&self.values).zip(vector) {
            let factor = size * coordinate / value.sqrt();
            out.iter_mut().zip(row).for_each(|(sum, v)| *sum += factor * v);
        }
        out
    }
}

fn weighted_sum(rows: &[f32], width: usize, members: &[usize], coefficients: &[f64]) -> Vec<f64> {
    let mut out = vec![0.0; width];
    for (&unit, &coefficient) in members.iter().zip(coefficients) {
        let row = &rows[unit * width..(unit + 1) * width];
        out.iter_mut().zip(row).for_each(|(sum, &value)| *sum += coefficient * f64::from(value));
    }
    out
}
