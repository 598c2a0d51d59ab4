use kintsugi_runtime::ThreadPool;

use crate::SplitMix64;

/// How the clusters are searched for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KMeansOptions {
    /// Starts from different seeds; the one with the smallest inertia is kept.
    pub restarts: usize,
    /// Most assignments of all points in one start.
    pub iterations: usize,
    /// Seed of the starts.
    pub seed: u64,
}

impl Default for KMeansOptions {
    /// Ten starts of up to 300 iterations, seed 0.
    fn default() -> Self {
        KMeansOptions { restarts: 10, iterations: 300, seed: 0 }
    }
}

/// A partition of points into clusters that no move of a point to another centre improves.
///
/// The points are known by their inner products alone (kernel k-means): with the Gram matrix of vectors this is
/// Lloyd's algorithm on those vectors, at a cost per iteration that does not depend on their length. Starts are
/// k-means++ with the best of `2 + ln k` candidates each (Arthur and Vassilvitskii 2007). An empty cluster takes the
/// point that is farthest from its centre.
#[derive(Clone, Debug, PartialEq)]
pub struct KernelKMeans {
    /// Cluster of each point; clusters are numbered by their first points.
    pub assignment: Vec<usize>,
    /// Number of clusters: `k`, or the number of points where that is less.
    pub clusters: usize,
    /// Sum of the squared distances of the points from their centres.
    pub inertia: f64,
}

impl KernelKMeans {
    /// Divides the `n` points with the symmetric Gram matrix `gram` (`[n, n]`) into `k` clusters.
    ///
    /// # Panics
    /// When the matrix is not `[n, n]`, or `k` is 0 while there are points.
    pub fn new(gram: &[f64], n: usize, k: usize, options: &KMeansOptions, pool: &ThreadPool) -> Self {
        assert_eq!(gram.len(), n * n, "the Gram matrix is [n, n]");
        assert!(k > 0 || n == 0, "points need at least one cluster");
        if k >= n {
            return KernelKMeans { assignment: (0..n).collect(), clusters: n, inertia: 0.0 };
        }
        let problem = Problem { gram, n, k };
        let starts = pool.map(options.restarts.max(1), |start| {
            // Each start has a sequence of its own, so that more starts never change the first ones.
            let mut random = SplitMix64::new(SplitMix64::at(options.seed, start as u64).bits());
            problem.descend(problem.plus_plus(&mut random), options.iterations.max(1))
        });
        let best = starts.into_iter().reduce(|best, other| if other.1 < best.1 { other } else { best });
        let (assignment, inertia) = best.unwrap_or_default();
        KernelKMeans { assignment: by_first_point(assignment, k), clusters: k, inertia }
    }
}

/// The points and the number of clusters.
struct Problem<'a> {
    gram: &'a [f64],
    n: usize,
    k: usize,
}

impl Problem<'_> {
    fn row(&self, i: usize) -> &[f64] {
        &self.gram[i * self.n..(i + 1) * self.n]
    }

    fn norm(&self, i: usize) -> f64 {
        self.gram[i * (self.n + 1)]
    }

    /// Squared distance of two points.
    fn distance(&self, i: usize, j: usize) -> f64 {
        (self.norm(i) + self.norm(j) - 2.0 * self.gram[i * self.n + j]).max(0.0)
    }

    /// Points to start from, and the nearest of them for every point.
    fn plus_plus(&self, random: &mut SplitMix64) -> Vec<usize> {
        let first = ((random.uniform() * self.n as f64) as usize).min(self.n - 1);
        let mut nearest = vec![0; self.n];
        let mut distances: Vec<f64> = (0..self.n).map(|i| self.distance(i, first)).collect();
        let candidates = 2 + (self.k as f64).ln() as usize;
        for centre in 1..self.k {
            let mut best: Option<(f64, usize)> = None;
            for _ in 0..candidates {
                let candidate = draw(&distances, random);
                let left: f64 = (0..self.n).map(|i| distances[i].min(self.distance(i, candidate))).sum();
                if best.is_none_or(|(least, _)| left < least) {
                    best = Some((left, candidate));
                }
            }
            let Some((_, chosen)) = best else { break };
            for i in 0..self.n {
                let distance = self.distance(i, chosen);
                if distance < distances[i] {
                    (distances[i], nearest[i]) = (distance, centre);
                }
            }
        }
        nearest
    }

    /// Lloyd's iterations from an assignment to one that stays.
    fn descend(&self, mut assignment: Vec<usize>, iterations: usize) -> (Vec<usize>, f64) {
        let mut centres = self.centres(&mut assignment);
        let mut inertia = self.inertia(&assignment, &centres);
        for _ in 0..iterations {
            let mut next: Vec<usize> = (0..self.n).map(|i| self.closest(i, assignment[i], &centres)).collect();
            if next == assignment {
                break;
            }
            let moved = self.centres(&mut next);
            let after = self.inertia(&next, &moved);
            // Rounding may make two partitions pass the points to and fro for ever.
            if after >= inertia {
                break;
            }
            (assignment, centres, inertia) = (next, moved, after);
        }
        (assignment, inertia)
    }

    /// Products of the points with the sums of the clusters. Empty clusters are filled first.
    fn centres(&self, assignment: &mut [usize]) -> Centres {
        let mut centres = self.sums(assignment);
        while let Some(empty) = centres.counts.iter().position(|&count| count == 0) {
            let mut farthest: Option<(f64, usize)> = None;
            for (i, &cluster) in assignment.iter().enumerate() {
                let distance = centres.distance(self, i, cluster);
                if centres.counts[cluster] > 1 && farthest.is_none_or(|(most, _)| distance > most) {
                    farthest = Some((distance, i));
                }
            }
            let Some((_, point)) = farthest else { break };
            assignment[point] = empty;
            centres = self.sums(assignment);
        }
        centres
    }

    fn sums(&self, assignment: &[usize]) -> Centres {
        let mut counts = vec![0; self.k];
        let mut norms = vec![0.0; self.k];
        let mut products = vec![0.0; self.n * self.k];
        for &cluster in assignment {
            counts[cluster] += 1;
        }
        for (i, products) in products.chunks_exact_mut(self.k).enumerate() {
            for (&cluster, value) in assignment.iter().zip(self.row(i)) {
                products[cluster] += value;
            }
            norms[assignment[i]] += products[assignment[i]];
        }
        Centres { counts, norms, products }
    }

    /// The centre that is closest; the present one where none is closer, else the first.
    fn closest(&self, point: usize, present: usize, centres: &Centres) -> usize {
        let mut best = (centres.distance(self, point, present), present);
        for cluster in 0..self.k {
            let distance = centres.distance(self, point, cluster);
            if distance < best.0 {
                best = (distance, cluster);
            }
        }
        best.1
    }

    fn inertia(&self, assignment: &[usize], centres: &Centres) -> f64 {
        assignment.iter().enumerate().map(|(i, &cluster)| centres.distance(self, i, cluster).max(0.0)).sum()
    }
}

/// The centres, by their products with the points.
struct Centres {
    counts: Vec<usize>,
    /// Squared norms of the sums.
    norms: Vec<f64>,
    /// `[n, k]`: products of the points with the sums.
    products: Vec<f64>,
}

impl Centres {
    /// Squared distance of a point from a centre that is not empty.
    fn distance(&self, problem: &Problem<'_>, point: usize, cluster: usize) -> f64 {
        let count = self.counts[cluster];
        if count == 0 {
            return f64::INFINITY;
        }
        let count = count as f64;
        let product = self.products[point * problem.k + cluster];
        problem.norm(point) - 2.0 * product / count + self.norms[cluster] / (count * count)
    }
}

/// An index, with the chance of its weight; the largest where all weights are zero or not finite is index 0.
fn draw(weights: &[f64], random: &mut SplitMix64) -> usize {
    let total: f64 = weights.iter().sum();
    let mut left = random.uniform() * total;
    for (i, &weight) in weights.iter().enumerate() {
        left -= weight;
        if left < 0.0 && weight > 0.0 {
            return i;
        }
    }
    weights.iter().rposition(|&weight| weight > 0.0).unwrap_or(0)
}

/// The same partition with the clusters in the order of their first points.
fn by_first_point(assignment: Vec<usize>, k: usize) -> Vec<usize> {
    let mut names = vec![usize::MAX; k];
    let mut next = 0;
    assignment
        .into_iter()
        .map(|cluster| {
            if names[cluster] == usize::MAX {
                names[cluster] = next;
                next += 1;
            }
            names[cluster]
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Points around `centres` corners of a large square, and their Gram matrix.
    fn corners(per_corner: usize) -> (Vec<[f64; 2]>, Vec<f64>) {
        let mut random = SplitMix64::new(5);
        let points: Vec<[f64; 2]> = (0..4 * per_corner)
            .map(|i| {
                let (x, y) = ((i % 2) as f64 * 100.0, (i / 2 % 2) as f64 * 100.0);
                [x + random.uniform(), y + random.uniform()]
            })
            .collect();
        let gram = points.iter().flat_map(|a| points.iter().map(|b| a[0] * b[0] + a[1] * b[1])).collect();
        (points, gram)
    }

    #[test]
    fn corners_are_found_with_the_inertia_of_the_definition() {
        let (points, gram) = corners(9);
        let n = points.len();
        for threads in [1, 2, 7] {
            let pool = ThreadPool::with_threads(threads);
            let result = KernelKMeans::new(&gram, n, 4, &KMeansOptions::default(), &pool);
            assert_eq!(result.assignment, (0..n).map(|i| i % 4).collect::<Vec<_>>());
            let mut inertia = 0.0;
            for cluster in 0..4 {
                let members: Vec<&[f64; 2]> = points.iter().skip(cluster).step_by(4).collect();
                for axis in 0..2 {
                    let mean = members.iter().map(|point| point[axis]).sum::<f64>() / members.len() as f64;
                    inertia += members.iter().map(|point| (point[axis] - mean).powi(2)).sum::<f64>();
                }
            }
            assert!((result.inertia - inertia).abs() < 1e-8 * inertia, "{} {inertia}", result.inertia);
        }
    }

    #[test]
    fn no_partition_of_few_points_is_better() {
        let pool = ThreadPool::with_threads(2);
        let mut random = SplitMix64::new(17);
        for case in 0..20 {
            let (n, k) = (7, 2 + case % 3);
            let points: Vec<f64> = (0..n * 3).map(|_| random.uniform()).collect();
            let dot = |i: usize, j: usize| (0..3).map(|l| points[i * 3 + l] * points[j * 3 + l]).sum::<f64>();
            let gram: Vec<f64> = (0..n * n).map(|at| dot(at / n, at % n)).collect();
            let problem = Problem { gram: &gram, n, k };
            let mut best = f64::INFINITY;
            for code in 0..k.pow(n as u32) {
                let assignment: Vec<usize> = (0..n).map(|i| code / k.pow(i as u32) % k).collect();
                let centres = problem.sums(&assignment);
                if centres.counts.iter().all(|&count| count > 0) {
                    best = best.min(problem.inertia(&assignment, &centres));
                }
            }
            let options = KMeansOptions { restarts: 100, ..Default::default() };
            let found = KernelKMeans::new(&gram, n, k, &options, &pool).inertia;
            assert!((found - best).abs() < 1e-9, "{case}: {found} {best}");
        }
    }

    #[test]
    fn equal_points_and_more_clusters_than_points() {
        let pool = ThreadPool::with_threads(1);
        let options = KMeansOptions::default();
        let equal = KernelKMeans::new(&[1.0; 25], 5, 3, &options, &pool);
        assert_eq!((equal.clusters, equal.inertia), (3, 0.0));
        assert!((0..3).all(|cluster| equal.assignment.contains(&cluster)));
        let alone = KernelKMeans::new(&[1.0; 4], 2, 9, &options, &pool);
        assert_eq!((alone.assignment, alone.clusters), (vec![0, 1], 2));
        assert_eq!(KernelKMeans::new(&[], 0, 3, &options, &pool).clusters, 0);
    }
}
