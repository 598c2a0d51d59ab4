use std::cmp::Ordering;
use std::sync::OnceLock;

use kintsugi_linalg::UpperTriangle;
use kintsugi_runtime::{Error, ErrorCode, Result, ThreadPool};
use kintsugi_weights::LowRank;

use crate::UnitStack;
use crate::weighted_units::WeightedUnits;

/// What one adapter has for a Linear: the update `weight · scaling · B A` is its part of the sum.
#[derive(Clone, Copy, Debug)]
pub struct MergeSource<'a> {
    /// `B [out, r]` and `A [r, in]`.
    pub factors: &'a LowRank,
    /// What the adapter multiplies B A with.
    pub scaling: f64,
    /// What the user multiplies the update of the adapter with.
    pub weight: f64,
}

impl MergeSource<'_> {
    /// The units in an order that their content decides.
    pub(crate) fn unit_order(&self) -> Vec<usize> {
        let (rank, width) = (self.factors.rank(), self.factors.in_features());
        let a = |unit: usize| &self.factors.a()[unit * width..(unit + 1) * width];
        let b = |unit: usize| self.factors.b().iter().skip(unit).step_by(rank);
        let mut order: Vec<usize> = (0..rank).collect();
        order.sort_by(|&i, &j| compare(a(i), a(j)).then_with(|| compare(b(i), b(j))));
        order
    }

    /// `weight · scaling`.
    pub fn coefficient(&self) -> f64 {
        self.weight * self.scaling
    }
}

/// All that is merged for one Linear. Sources and their units are in an order that their content alone decides.
#[derive(Debug)]
pub struct LinearSources<'a> {
    name: &'a str,
    sources: Vec<MergeSource<'a>>,
    given: Vec<usize>,
    alone: bool,
    stack: OnceLock<UnitStack>,
    second_moment: Option<&'a UpperTriangle<f64>>,
    weighted: OnceLock<WeightedUnits>,
}

impl<'a> LinearSources<'a> {
    /// Checks and sorts the sources of the Linear `name`. `adapters` is the number of adapters of the whole merge;
    /// some of them may have nothing for this Linear.
    ///
    /// # Errors
    /// `ERR_SHAPE_MISMATCH` when the sources update matrices of different shapes, `ERR_VALUE_NOT_FINITE` for NaN or
    /// infinite factors, scalings or weights, `ERR_OPTION_INVALID` without sources.
    pub fn new(name: &'a str, sources: &[MergeSource<'a>], adapters: usize) -> Result<Self> {
        let Some(first) = sources.first() else {
            return Err(Error::new(ErrorCode::OptionInvalid, "there is nothing to merge")
                .subject(name)
                .hint("Give at least one adapter"));
        };
        let shape = |factors: &LowRank| (factors.out_features(), factors.in_features());
        for source in sources {
            let (expected, found) = (shape(first.factors), shape(source.factors));
            if expected != found {
                let message = format!(
                    "one adapter updates a {}×{} matrix, another a {}×{} one",
                    expected.0, expected.1, found.0, found.1
                );
                return Err(Error::new(ErrorCode::ShapeMismatch, message)
                    .subject(name)
                    .hint("Merge adapters that were trained on the same base model"));
            }
            let values = source.factors.b().iter().chain(source.factors.a());
            if !source.coefficient().is_finite() || !values.into_iter().all(|value| value.is_finite()) {
                return Err(Error::new(ErrorCode::ValueNotFinite, "a factor, scaling or weight is NaN or infinite")
                    .subject(name)
                    .hint("Check the adapter, it is damaged or its training has diverged"));
            }
        }
        let mut given: Vec<usize> = (0..sources.len()).collect();
        given.sort_by(|&i, &j| by_content(&sources[i], &sources[j]));
        let sources: Vec<MergeSource<'a>> = given.iter().map(|&i| sources[i]).collect();
        Ok(LinearSources {
            name,
            sources,
            given,
            alone: adapters == 1,
            stack: OnceLock::new(),
            second_moment: None,
            weighted: OnceLock::new(),
        })
    }

    /// Weights every error by what the Linear reads: `second_moment` is `S = Σ x xᵀ` over its inputs x.
    ///
    /// # Errors
    /// `ERR_STATISTICS_MISMATCH` when the statistics are of a Linear with another number of inputs.
    pub fn weighted_by(mut self, second_moment: &'a UpperTriangle<f64>) -> Result<Self> {
        let (found, expected) = (second_moment.side(), self.in_features());
        if found != expected {
            let message = format!("the statistics are of {found} inputs, the adapters update a Linear of {expected}");
            return Err(Error::new(ErrorCode::StatisticsMismatch, message)
                .subject(self.name)
                .hint("Give statistics of the base model of the adapters"));
        }
        self.second_moment = Some(second_moment);
        Ok(self)
    }

    /// The second moment that errors are weighted by.
    pub fn second_moment(&self) -> Option<&'a UpperTriangle<f64>> {
        self.second_moment
    }

    /// The units in the metric of the inputs, where there is one.
    pub(crate) fn weighted(&self, pool: &ThreadPool) -> Option<&WeightedUnits> {
        let second_moment = self.second_moment?;
        Some(self.weighted.get_or_init(|| WeightedUnits::new(self.stack(), second_moment, pool)))
    }

    /// The name of the Linear.
    pub fn name(&self) -> &str {
        self.name
    }

    /// Rows of the update.
    pub fn out_features(&self) -> usize {
        self.sources[0].factors.out_features()
    }

    /// Columns of the update.
    pub fn in_features(&self) -> usize {
        self.sources[0].factors.in_features()
    }

    /// The sources in canonical order.
    pub fn sources(&self) -> &[MergeSource<'a>] {
        &self.sources
    }

    /// For each source in canonical order its index in the order that was given.
    pub fn given(&self) -> &[usize] {
        &self.given
    }

    /// Whether the whole merge is of one adapter.
    pub fn alone(&self) -> bool {
        self.alone
    }

    /// The units of all sources below each other.
    pub fn stack(&self) -> &UnitStack {
        self.stack.get_or_init(|| UnitStack::new(&self.sources))
    }

    /// The largest rank of the sources.
    pub fn largest_rank(&self) -> usize {
        self.sources.iter().map(|source| source.factors.rank()).max().unwrap_or(0)
    }

    /// The rank that all sources share.
    ///
    /// # Errors
    /// `ERR_OPTION_INVALID` when they differ, with the reason why `method` needs one.
    pub fn common_rank(&self, method: &str) -> Result<usize> {
        let rank = self.largest_rank();
        if self.sources.iter().all(|source| source.factors.rank() == rank) {
            return Ok(rank);
        }
        let ranks: Vec<String> = self.sources.iter().map(|source| source.factors.rank().to_string()).collect();
        let message = format!("{method} pairs the factors by position, but the ranks are {}", ranks.join(", "));
        Err(Error::new(ErrorCode::OptionInvalid, message)
            .subject(self.name)
            .hint("Use svd or cat, or the coordinates 'update', which take any ranks"))
    }
}

/// A total order that the content decides, whatever the order of the adapters.
fn by_content(left: &MergeSource<'_>, right: &MergeSource<'_>) -> Ordering {
    (left.factors.rank().cmp(&right.factors.rank()))
        .then(left.weight.total_cmp(&right.weight))
        .then(left.scaling.total_cmp(&right.scaling))
        .then_with(|| compare(left.factors.a(), right.factors.a()))
        .then_with(|| compare(left.factors.b(), right.factors.b()))
}

/// Lexicographic, by the total order of floats.
fn compare<'a>(left: impl IntoIterator<Item = &'a f32>, right: impl IntoIterator<Item = &'a f32>) -> Ordering {
    left.into_iter().zip(right).map(|(l, r)| l.total_cmp(r)).find(|order| order.is_ne()).unwrap_or(Ordering::Equal)
}
