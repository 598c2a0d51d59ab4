use kintsugi_runtime::{Error, ErrorCode, Result, ThreadPool, nearest};
use kintsugi_weights::{ElementType, LowRank};

use crate::elementwise::{DARE_LINEAR, DARE_TIES, KNOTS, MAGNITUDE_PRUNE, TIES};
use crate::{Cat, FactorUpdate, GaugeFreeLego, IsoC, Lego, Linear, LinearSources, MergeOptions, ScaleRule, Svd, Tsv};

/// What a method makes of one Linear, before it is rounded to the type that is stored.
#[derive(Clone, Debug)]
pub struct Solution {
    /// The merged factors; their scaling is 1.
    pub update: FactorUpdate,
    /// Clustering methods: the number of units behind each term.
    pub cluster_sizes: Vec<usize>,
    /// Clustering methods: what each centre was multiplied with.
    pub scales: Vec<f64>,
}

impl Solution {
    /// A solution without clusters.
    pub(crate) fn plain(update: FactorUpdate) -> Self {
        Solution { update, cluster_sizes: Vec::new(), scales: Vec::new() }
    }
}

/// A method that merges the factors that several adapters have for one Linear.
pub trait MergeMethod: Sync {
    /// The name that users write.
    fn name(&self) -> &'static str;

    /// What it does, in a line.
    fn summary(&self) -> &'static str;

    /// The options that it reads beside rank and scale, as users write them.
    fn options(&self) -> &'static [&'static str];

    /// Whether it means something for a single adapter. Others leave one as it is, or cut it to the rank by its
    /// singular values.
    fn merges_one(&self) -> bool {
        false
    }

    /// Whether the rank of the result is that of the sources, whatever the rank option says.
    fn keeps_rank(&self) -> bool {
        false
    }

    /// Whether statistics of the inputs change what it finds. With those, others only know
    /// [`crate::ScaleRule::ClosedForm`] and [`crate::ScaleRule::Refit`] in the metric of the inputs.
    fn weighs_inputs(&self) -> bool {
        false
    }

    /// Whether it gives the exact sum, so that there is nothing to weigh.
    fn is_exact(&self) -> bool {
        false
    }

    /// The most that the rank of the result can be for sources of these ranks, whatever the rank option says; the
    /// update has `smaller_side` rows or columns, whichever are fewer.
    fn rank_of(&self, ranks: &[usize], smaller_side: usize) -> usize;

    /// The stored factors at once, from a method that only moves numbers about.
    fn factors(&self, _linear: &LinearSources<'_>, _factor_type: ElementType) -> Option<LowRank> {
        None
    }

    /// Merges.
    ///
    /// # Errors
    /// `ERR_OPTION_INVALID` when the sources or options do not suit the method, `ERR_SOLVER_FAILED`.
    fn solve(&self, linear: &LinearSources<'_>, options: &MergeOptions, pool: &ThreadPool) -> Result<Solution>;
}

/// Every method.
pub const METHODS: &[&dyn MergeMethod] = &[
    &Lego,
    &GaugeFreeLego,
    &Cat,
    &Svd,
    &Linear,
    &TIES,
    &DARE_LINEAR,
    &DARE_TIES,
    &MAGNITUDE_PRUNE,
    &KNOTS,
    &Tsv,
    &IsoC,
];

/// Refuses statistics of the inputs where nothing would read them.
///
/// # Errors
/// `ERR_OPTION_INVALID` with the name of the method and what would read them.
pub fn check_statistics(method: &dyn MergeMethod, scale: ScaleRule) -> Result<()> {
    if method.weighs_inputs() || (scale != ScaleRule::Method && !method.is_exact()) {
        return Ok(());
    }
    let weighing: Vec<&str> = METHODS.iter().filter(|method| method.weighs_inputs()).map(|m| m.name()).collect();
    let name = method.name();
    let message = match method.is_exact() {
        true => format!("{name} is the exact sum, statistics of the inputs change nothing of it"),
        false => format!("{name} does not read statistics of the inputs"),
    };
    Err(Error::new(ErrorCode::OptionInvalid, message).subject("calibration").hint(format!(
        "Use {}, or a method that approximates with scale \"closed-form\" or \"refit\"",
        weighing.join(", ")
    )))
}

/// The method of that name.
///
/// # Errors
/// `ERR_OPTION_INVALID`, with the nearest name and all names in the hint.
pub fn merge_method(name: &str) -> Result<&'static dyn MergeMethod> {
    METHODS.iter().find(|method| method.name() == name).copied().ok_or_else(|| {
        let names: Vec<&str> = METHODS.iter().map(|method| method.name()).collect();
        let closest = nearest(name, names.iter().copied()).unwrap_or_default();
        Error::new(ErrorCode::OptionInvalid, format!("there is no merge method \"{name}\""))
            .subject("method")
            .hint(format!("Did you mean \"{closest}\"? The methods are {}", names.join(", ")))
    })
}
