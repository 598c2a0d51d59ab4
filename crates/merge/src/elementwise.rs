use std::ops::Range;

use kintsugi_linalg::{LeadingDirections, MatrixView, MatrixViewMut, SplitMix64, add_product, transposed};
use kintsugi_runtime::{Error, ErrorCode, Result, ThreadPool};

use crate::side_basis::SideBasis;
use crate::spectrum::{along, congruence, principal_axes};
use crate::{Coordinates, FactorUpdate, LinearSources, MergeMethod, MergeOptions, RankRule, SignElection, Solution};

/// Rows of a matrix that one task merges.
const BAND: usize = 32;

/// A rule that looks at one element of every adapter at a time.
///
/// The elements are those of A and B, of the updates, or of the updates in other coordinates: `coordinates` says which.
/// Updates are made and merged in bands of rows; only the merged matrix is ever whole.
#[derive(Clone, Copy, Debug)]
pub struct Elementwise {
    name: &'static str,
    summary: &'static str,
    options: &'static [&'static str],
    prune: Prune,
    elect: bool,
    default: Coordinates,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Prune {
    Magnitude,
    Random,
}

/// TIES (arXiv 2306.01708): trim each adapter to its largest elements, elect a sign for every element, take the mean
/// of those that agree. As in peft, signs are elected before weights are applied, and the mean is over the number of
/// those that agree. Elements as large as the smallest one that stays all stay.
pub const TIES: Elementwise = Elementwise {
    name: "ties",
    summary: "the largest elements, where their signs agree",
    options: &["coordinates", "density", "signElection"],
    prune: Prune::Magnitude,
    elect: true,
    default: Coordinates::Update,
};

/// DARE (arXiv 2311.03099): drop elements at random, make up for them, take the weighted sum.
pub const DARE_LINEAR: Elementwise = Elementwise {
    name: "dare-linear",
    summary: "random elements, made up for, summed",
    options: &["coordinates", "density", "seed"],
    prune: Prune::Random,
    elect: false,
    default: Coordinates::Update,
};

/// DARE's random elements, merged as TIES does.
pub const DARE_TIES: Elementwise = Elementwise {
    name: "dare-ties",
    summary: "random elements, made up for, where their signs agree",
    options: &["coordinates", "density", "seed", "signElection"],
    prune: Prune::Random,
    elect: true,
    default: Coordinates::Update,
};

/// The weighted sum of the largest elements of each adapter.
pub const MAGNITUDE_PRUNE: Elementwise = Elementwise {
    name: "magnitude-prune",
    summary: "the largest elements, summed",
    options: &["coordinates", "density"],
    prune: Prune::Magnitude,
    elect: false,
    default: Coordinates::Update,
};

/// KnOTS (arXiv 2410.19735) with TIES as its rule: TIES in the shared left singular vectors of all updates.
pub const KNOTS: Elementwise = Elementwise {
    name: "knots",
    summary: "TIES in the shared singular directions of all updates",
    options: &["coordinates", "density", "signElection"],
    prune: Prune::Magnitude,
    elect: true,
    default: Coordinates::Knots,
};

impl MergeMethod for Elementwise {
    fn name(&self) -> &'static str {
        self.name
    }

    fn summary(&self) -> &'static str {
        self.summary
    }

    fn options(&self) -> &'static [&'static str] {
        self.options
    }

    fn rank_of(&self, _ranks: &[usize], smaller_side: usize) -> usize {
        smaller_side
    }

    fn solve(&self, linear: &LinearSources<'_>, options: &MergeOptions, pool: &ThreadPool) -> Result<Solution> {
        let coordinates = options.coordinates.unwrap_or(self.default);
        let rule = Rule {
            density: options.density,
            prune: self.prune,
            elect: self.elect.then_some(options.sign_election),
            // The axes of these coordinates have no sign of their own, so that plus must not win where votes tie.
            sums_break_ties: matches!(coordinates, Coordinates::Core | Coordinates::Knots),
            seed: SplitMix64::new(options.seed ^ hash(linear.name())).bits(),
        };
        let update = match coordinates {
            Coordinates::Factors => rule.on_factors(linear, self.name, options, pool)?,
            _ => rule.on_updates(linear, coordinates, options, pool)?,
        };
        Ok(Solution::plain(update))
    }
}

/// FNV-1a, so that the Linears of a model drop different elements.
fn hash(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// What is done to the elements.
struct Rule {
    density: f64,
    prune: Prune,
    elect: Option<SignElection>,
    sums_break_ties: bool,
    seed: u64,
}

/// Writes some rows of a matrix, `[rows, columns]`.
type FillRows<'a> = Box<dyn Fn(Range<usize>, &mut [f32]) + Sync + 'a>;

/// The elements of one adapter: a matrix that is written band by band.
struct Elements<'a> {
    fill: FillRows<'a>,
    weight: f64,
}

impl Rule {
    /// A from the A, B from the B.
    fn on_factors(
        &self,
        linear: &LinearSources<'_>,
        method: &str,
        options: &MergeOptions,
        pool: &ThreadPool,
    ) -> Result<FactorUpdate> {
        let rank = linear.common_rank(method)?;
        if options.rank.is_some_and(|rule| rule != RankRule::Fixed(rank)) {
            let message = format!("in the coordinates 'factors' the result has the rank of the adapters, {rank}");
            return Err(Error::new(ErrorCode::OptionInvalid, message)
                .subject("rank")
                .hint("Leave the rank out, or use the coordinates 'update'"));
        }
        let (out_features, in_features) = (linear.out_features(), linear.in_features());
        let merged = |factor: fn(&kintsugi_weights::LowRank) -> &[f32], rows: usize, columns: usize, signed: bool| {
            let sources: Vec<Elements<'_>> = linear
                .sources()
                .iter()
                .map(|source| {
                    let values = factor(source.factors);
                    let root = source.coefficient().abs().sqrt();
                    Elements {
                        fill: Box::new(move |range: Range<usize>, out: &mut [f32]| {
                            out.copy_from_slice(&values[range.start * columns..range.end * columns]);
                        }),
                        weight: if signed { root.copysign(source.coefficient()) } else { root },
                    }
                })
                .collect();
            self.merge(&sources, rows, columns, u64::from(signed), pool)
        };
        let b = merged(|factors| factors.b(), out_features, rank, false);
        let a = merged(|factors| factors.a(), rank, in_features, true);
        let wide = |values: Vec<f32>| values.into_iter().map(f64::from).collect();
        Ok(FactorUpdate { out_features, in_features, b: wide(transposed(&b, out_features, rank)), a: wide(a) })
    }

    /// A merged matrix in the coordinates, cut to the rank.
    fn on_updates(
        &self,
        linear: &LinearSources<'_>,
        coordinates: Coordinates,
        options: &MergeOptions,
        pool: &ThreadPool,
    ) -> Result<FactorUpdate> {
        let frame = Frame::new(linear, coordinates, pool)?;
        let (p, q, turned) = (frame.left_size, frame.right_size, frame.left_size > frame.right_size);
        let (rows, columns) = if turned { (q, p) } else { (p, q) };
        let stack = linear.stack();
        let sources: Vec<Elements<'_>> = stack
            .sources
            .iter()
            .zip(linear.sources())
            .map(|(range, source)| {
                let scaling = source.scaling as f32;
                let part = |values: &[f32], width: usize| values[range.start * width..range.end * width].to_vec();
                // The side that the rows belong to is kept by rows, so that a band of them is one piece.
                let (left, right) = (part(&frame.left, p), part(&frame.right, q));
                let units = range.len();
                let (left, right) = if turned { (right, left) } else { (left, right) };
                let left: Vec<f32> = transposed(&left, units, rows).iter().map(|value| value * scaling).collect();
                Elements {
                    fill: Box::new(move |range: Range<usize>, out: &mut [f32]| {
                        out.fill(0.0);
                        let band = MatrixView::new(&left[range.start * units..range.end * units], range.len(), units);
                        let right = MatrixView::new(&right, units, columns);
                        add_product(MatrixViewMut::new(out, range.len(), columns), band, right);
                    }),
                    weight: source.weight,
                }
            })
            .collect();
        let merged = self.merge(&sources, rows, columns, 0, pool);
        drop(sources);
        let rule = options.rank.unwrap_or(RankRule::Fixed(linear.largest_rank()));
        let directions = LeadingDirections::of_f32(&merged, rows, columns, rule.most(), pool)?;
        let rank = rule.pick(&directions.values, directions.energy);
        let factors = directions.balanced(rank, pool);
        let (left, right) = if turned { (factors.right, factors.left) } else { (factors.left, factors.right) };
        Ok(FactorUpdate {
            out_features: linear.out_features(),
            in_features: linear.in_features(),
            b: frame.lift_left(&left, factors.rank, pool),
            a: frame.lift_right(&right, factors.rank, pool),
        })
    }

    /// Merges `[rows, columns]` elements of every source. `stream` tells matrices of one Linear apart.
    fn merge(&self, sources: &[Elements<'_>], rows: usize, columns: usize, stream: u64, pool: &ThreadPool) -> Vec<f32> {
        let thresholds: Vec<f32> = match self.prune {
            Prune::Magnitude if self.density < 1.0 => {
                let keep = (self.density * (rows * columns) as f64) as u64;
                sources.iter().map(|source| threshold(source, rows, columns, keep, pool)).collect()
            }
            _ => vec![0.0; sources.len()],
        };
        let mut merged = vec![0.0f32; rows * columns];
        pool.for_each_chunk(&mut merged, BAND * columns, |index, out| {
            let range = index * BAND..index * BAND + out.len() / columns;
            let mut tile = vec![0.0f32; out.len()];
            let mut votes = vec![Votes::default(); out.len()];
            for (position, source) in sources.iter().enumerate() {
                (source.fill)(range.clone(), &mut tile);
                self.drop_elements(&mut tile, thresholds[position], position, stream, range.start * columns);
                for (votes, &value) in votes.iter_mut().zip(&tile) {
                    votes.add(value, source.weight);
                }
            }
            for (out, votes) in out.iter_mut().zip(&votes) {
                *out = votes.outcome(self.elect, self.sums_break_ties) as f32;
            }
        });
        merged
    }

    fn drop_elements(&self, tile: &mut [f32], threshold: f32, source: usize, stream: u64, first: usize) {
        if self.density >= 1.0 {
            return;
        }
        match self.prune {
            Prune::Magnitude => tile.iter_mut().filter(|value| value.abs() < threshold).for_each(|value| *value = 0.0),
            Prune::Random => {
                let seed = SplitMix64::at(self.seed, 2 * source as u64 + stream).bits();
                let mut random = SplitMix64::at(seed, first as u64);
                for value in tile {
                    *value =
                        if random.uniform() < self.density { (f64::from(*value) / self.density) as f32 } else { 0.0 };
                }
            }
        }
    }
}

/// What the adapters say about one element.
#[derive(Clone, Copy, Debug, Default)]
struct Votes {
    total: f64,
    positive: f64,
    negative: f64,
    positives: u32,
    negatives: u32,
}

impl Votes {
    fn add(&mut self, value: f32, weight: f64) {
        let value = f64::from(value);
        self.total += value;
        if value > 0.0 {
            self.positive += weight * value;
            self.positives += 1;
        } else if value < 0.0 {
            self.negative += weight * value;
            self.negatives += 1;
        }
    }

    fn outcome(&self, elect: Option<SignElection>, sums_break_ties: bool) -> f64 {
        let positive = match elect {
            None => return self.positive + self.negative,
            Some(SignElection::Total) => self.total >= 0.0,
            Some(SignElection::Frequency) if self.positives == self.negatives && sums_break_ties => self.total >= 0.0,
            Some(SignElection::Frequency) => self.positives >= self.negatives,
        };
        let (sum, count) = if positive { (self.positive, self.positives) } else { (self.negative, self.negatives) };
        sum / f64::from(count.max(1))
    }
}

/// The `keep`-th largest magnitude of a matrix that is seen band by band: by the upper half of its bits, then by the
/// lower half among those that share the upper one.
fn threshold(source: &Elements<'_>, rows: usize, columns: usize, keep: u64, pool: &ThreadPool) -> f32 {
    if keep == 0 {
        return f32::INFINITY;
    }
    let count = |bin: &(dyn Fn(u32) -> Option<usize> + Sync)| -> Vec<u64> {
        // Few tasks, because each has a table of its own.
        let bands = rows.div_ceil(BAND);
        let tasks = bands.min(16);
        let tables = pool.map(tasks, |task| {
            let mut table = vec![0u64; 1 << 16];
            let mut tile = Vec::new();
            for band in (task..bands).step_by(tasks) {
                let range = band * BAND..rows.min((band + 1) * BAND);
                tile.resize(range.len() * columns, 0.0);
                (source.fill)(range, &mut tile);
                for value in &tile {
                    if let Some(bin) = bin(value.abs().to_bits()) {
                        table[bin] += 1;
                    }
                }
            }
            table
        });
        let mut sum = vec![0u64; 1 << 16];
        tables.iter().for_each(|table| sum.iter_mut().zip(table).for_each(|(sum, count)| *sum += count));
        sum
    };
    let find = |table: &[u64], mut left: u64| -> (u32, u64) {
        for (bin, &count) in table.iter().enumerate().rev() {
            if count >= left {
                return (bin as u32, left);
            }
            left -= count;
        }
        (0, left)
    };
    let (upper, left) = find(&count(&|bits| Some((bits >> 16) as usize)), keep);
    let (lower, _) = find(&count(&|bits| (bits >> 16 == upper).then_some((bits & 0xffff) as usize)), left);
    f32::from_bits(upper << 16 | lower)
}

/// Both sides of all units in the coordinates that the rule works in.
struct Frame<'a> {
    left_size: usize,
    right_size: usize,
    /// `[units, left_size]`.
    left: Vec<f32>,
    /// `[units, right_size]`.
    right: Vec<f32>,
    left_basis: Option<(SideBasis<'a>, Vec<f64>)>,
    right_basis: Option<(SideBasis<'a>, Vec<f64>)>,
}

impl<'a> Frame<'a> {
    fn new(linear: &'a LinearSources<'_>, coordinates: Coordinates, pool: &ThreadPool) -> Result<Self> {
        let stack = linear.stack();
        let units = stack.units();
        let mut frame = Frame {
            left_size: stack.out_features,
            right_size: stack.in_features,
            left: Vec::new(),
            right: Vec::new(),
            left_basis: None,
            right_basis: None,
        };
        let narrow = |values: Vec<f64>| -> Vec<f32> { values.into_iter().map(|value| value as f32).collect() };
        // Scalings are folded in evenly before the bases are taken.
        let scaling: Vec<f64> = stack.scalings.iter().map(|scaling| scaling.abs()).collect();
        let diagonal = |of: &dyn Fn(usize) -> f64| -> Vec<f64> {
            (0..units * units).map(|at| if at / units == at % units { of(at / units) } else { 0.0 }).collect()
        };
        match coordinates {
            Coordinates::Factors | Coordinates::Update => {}
            Coordinates::Core => {
                let basis = SideBasis::new(&stack.a, units, stack.in_features, stack.gram_a(pool), pool)?;
                let weights = diagonal(&|unit| scaling[unit]);
                let gram = congruence(&basis.coordinates, units, basis.dimension, &weights, pool);
                let (size, axes) = principal_axes(&gram, basis.dimension)?;
                frame.right = narrow(along(&basis.coordinates, units, basis.dimension, &axes, size, pool));
                frame.right_size = size;
                frame.right_basis = Some((basis, axes));
            }
            Coordinates::Knots => {}
        }
        if matches!(coordinates, Coordinates::Core | Coordinates::Knots) {
            let basis = SideBasis::new(&stack.b, units, stack.out_features, stack.gram_b(pool), pool)?;
            let weights = if coordinates == Coordinates::Core {
                diagonal(&|unit| scaling[unit])
            } else {
                // Σ ΔW ΔWᵀ in the coordinates of B: the products of A, unit by unit of one adapter.
                let gram = stack.gram_a(pool);
                let mut weights = vec![0.0; units * units];
                for range in &stack.sources {
                    for i in range.clone() {
                        for j in range.clone() {
                            weights[i * units + j] = scaling[i] * scaling[j] * gram[i * units + j];
                        }
                    }
                }
                weights
            };
            let gram = congruence(&basis.coordinates, units, basis.dimension, &weights, pool);
            let (size, axes) = principal_axes(&gram, basis.dimension)?;
            frame.left = narrow(along(&basis.coordinates, units, basis.dimension, &axes, size, pool));
            frame.left_size = size;
            frame.left_basis = Some((basis, axes));
        }
        if frame.left_basis.is_none() {
            frame.left.clone_from(&stack.b);
        }
        if frame.right_basis.is_none() {
            frame.right.clone_from(&stack.a);
        }
        Ok(frame)
    }

    fn lift_left(&self, values: &[f64], count: usize, pool: &ThreadPool) -> Vec<f64> {
        lift(self.left_basis.as_ref(), values, count, pool)
    }

    fn lift_right(&self, values: &[f64], count: usize, pool: &ThreadPool) -> Vec<f64> {
        lift(self.right_basis.as_ref(), values, count, pool)
    }
}

/// `[count, size]` in the coordinates of a frame as rows of the side.
fn lift(basis: Option<&(SideBasis<'_>, Vec<f64>)>, values: &[f64], count: usize, pool: &ThreadPool) -> Vec<f64> {
    let Some((basis, axes)) = basis else { return values.to_vec() };
    let size = axes.len() / basis.dimension.max(1);
    // Rows times axes: coordinates in the basis again.
    let turned = transposed(axes, size, basis.dimension);
    let inside = along(values, count, size, &turned, basis.dimension, pool);
    basis.lift(&inside, count, pool)
}
