use kintsugi_linalg::KMeansOptions;
use kintsugi_runtime::{Error, ErrorCode, Result, nearest};
use kintsugi_weights::ElementType;
use serde::{Deserialize, Serialize};

/// Most that a rank can be.
pub const MOST_RANK: usize = 1 << 16;
/// Most starts of k-means, and most iterations of one.
const MOST_RESTARTS: usize = 10_000;
const MOST_ITERATIONS: usize = 100_000;

/// How many terms the merged factors get.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum RankRule {
    /// That many, or fewer where the sources have fewer.
    Fixed(usize),
    /// As few as hold this share of the energy `‖T‖²` of the exact sum, and no more than `most`.
    Energy {
        /// In (0, 1].
        share: f64,
        /// Most terms.
        most: usize,
    },
}

impl RankRule {
    /// The rank for singular values of a matrix with that energy.
    pub(crate) fn pick(self, values: &[f64], energy: f64) -> usize {
        match self {
            RankRule::Fixed(rank) => rank,
            RankRule::Energy { share, most } => {
                let mut left = energy * share;
                let needed = values.iter().take_while(|&&value| {
                    let wanted = left > energy * 1e-14;
                    left -= value * value;
                    wanted
                });
                needed.count().clamp(1, most)
            }
        }
    }

    /// No more terms than that.
    pub fn most(self) -> usize {
        match self {
            RankRule::Fixed(rank) => rank,
            RankRule::Energy { most, .. } => most,
        }
    }
}

macro_rules! named {
    ($(#[$doc:meta])* $name:ident: $what:literal { $($(#[$variant_doc:meta])* $variant:ident = $text:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
        pub enum $name {
            $($(#[$variant_doc])* #[serde(rename = $text)] $variant,)+
        }

        impl $name {
            /// Every choice, as users write it.
            pub const NAMES: &'static [&'static str] = &[$($text,)+];

            /// As users write it.
            pub const fn name(self) -> &'static str {
                match self { $($name::$variant => $text,)+ }
            }

            /// The choice of that name.
            ///
            /// # Errors
            /// `ERR_OPTION_INVALID`, with the valid names.
            pub fn from_name(name: &str) -> Result<Self> {
                match name {
                    $($text => Ok($name::$variant),)+
                    other => Err(unknown($what, other, Self::NAMES)),
                }
            }
        }
    };
}

named! {
    /// In which coordinates a rule for single elements works. It is another operator in each.
    Coordinates: "coordinates" {
        /// On A and on B, each for itself, as plain combination types of peft do: products of factors of different
        /// adapters get into the sum. Needs equal ranks.
        Factors = "factors",
        /// On the updates `ΔW`, as the `_svd` combination types of peft do.
        Update = "update",
        /// On `Uᵀ ΔW V` for the singular vectors U of all B and V of all A (Core Space, arXiv 2509.17786).
        Core = "core",
        /// On `Uᵀ ΔW` for the left singular vectors U of all updates side by side (KnOTS, arXiv 2410.19735).
        Knots = "knots",
    }
}

named! {
    /// TIES: what decides the sign of an element.
    SignElection: "signElection" {
        /// The sign of the sum.
        Total = "total",
        /// The sign of the majority; plus where votes tie, or the sign of the sum in coordinates whose axes have no sign.
        Frequency = "frequency",
    }
}

named! {
    /// What the units of an adapter are before they are clustered.
    Gauge: "gauge" {
        /// Columns of B and rows of A as they were trained.
        Raw = "raw",
        /// The terms of the singular value decomposition of B A, so that rotated factors give the same result.
        Svd = "svd",
    }
}

named! {
    /// What is done to the merged factors at the end.
    ScaleRule: "scale" {
        /// Nothing.
        Method = "method",
        /// One factor for the whole update, the best one: `⟨M, T⟩ / ⟨M, M⟩`. With statistics of the inputs, as in
        /// [`ScaleRule::Refit`], products are `⟨M S, T⟩`.
        ClosedForm = "closed-form",
        /// The best B for this A: `T Aᵀ (A Aᵀ)⁻¹`.
        Refit = "refit",
    }
}

/// What all methods may be told; each reads its own part.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MergeOptions {
    /// Terms of the result; `None` for the largest rank of the sources.
    pub rank: Option<RankRule>,
    /// Type of the factors that are stored.
    #[serde(skip)]
    pub factor_type: ElementType,
    /// Elementwise methods: coordinates; `None` for the default of the method.
    pub coordinates: Option<Coordinates>,
    /// Pruning methods: share of the elements that stay, in (0, 1].
    pub density: f64,
    /// TIES and DARE-TIES: how signs are elected.
    pub sign_election: SignElection,
    /// DARE, k-means: seed.
    pub seed: u64,
    /// k-means: starts.
    pub restarts: usize,
    /// k-means: most iterations of a start.
    pub iterations: usize,
    /// LEGO, gauge-free LEGO: the units.
    pub gauge: Gauge,
    /// LEGO: cluster by direction, both halves of a unit brought to norm 1.
    pub normalize: bool,
    /// LEGO: give a centre the mean largest element of its members.
    pub parameter_reweighting: bool,
    /// LEGO: multiply the update by `√(reference rank / rank)`.
    pub output_reweighting: bool,
    /// LEGO: the reference rank; `None` for the mean rank of the sources.
    pub reference_rank: Option<f64>,
    /// What is done at the end.
    pub scale: ScaleRule,
    /// Measure what the merge kept.
    pub report: bool,
}

impl Default for MergeOptions {
    fn default() -> Self {
        let k_means = KMeansOptions::default();
        MergeOptions {
            rank: None,
            factor_type: ElementType::F32,
            coordinates: None,
            density: 0.5,
            sign_election: SignElection::Total,
            seed: k_means.seed,
            restarts: k_means.restarts,
            iterations: k_means.iterations,
            gauge: Gauge::Raw,
            normalize: false,
            parameter_reweighting: true,
            output_reweighting: true,
            reference_rank: None,
            scale: ScaleRule::Method,
            report: true,
        }
    }
}

impl MergeOptions {
    /// Checks every range.
    ///
    /// # Errors
    /// `ERR_OPTION_INVALID` with the name of the option.
    pub fn validate(&self) -> Result<()> {
        let invalid = |name: &str, message: &str, hint: &str| {
            Err(Error::new(ErrorCode::OptionInvalid, format!("{name} {message}")).subject(name).hint(hint))
        };
        match self.rank {
            Some(RankRule::Fixed(0) | RankRule::Energy { most: 0, .. }) => {
                return invalid("rank", "must be at least 1, but it is 0", "Give a rank of at least 1");
            }
            Some(rule) if rule.most() > MOST_RANK => {
                return invalid("rank", &format!("must be at most {MOST_RANK}"), "Give a smaller rank");
            }
            Some(RankRule::Energy { share, .. }) if !(share > 0.0 && share <= 1.0) => {
                return invalid("energy", "must be above 0 and at most 1", "Give a share, for example 0.95");
            }
            _ => {}
        }
        if !(self.density > 0.0 && self.density <= 1.0) {
            return invalid("density", "must be above 0 and at most 1", "Give the share that stays, for example 0.5");
        }
        if self.restarts == 0 || self.iterations == 0 {
            return invalid("restarts", "and iterations must be at least 1", "Leave them out for 10 and 300");
        }
        if self.restarts > MOST_RESTARTS {
            return invalid("restarts", &format!("must be at most {MOST_RESTARTS}"), "Leave it out for 10");
        }
        if self.iterations > MOST_ITERATIONS {
            return invalid("iterations", &format!("must be at most {MOST_ITERATIONS}"), "Leave it out for 300");
        }
        if self.reference_rank.is_some_and(|rank| !(rank > 0.0 && rank.is_finite())) {
            return invalid("referenceRank", "must be above 0", "Leave it out for the mean rank of the adapters");
        }
        Ok(())
    }

    /// The part that k-means reads.
    pub(crate) fn k_means(&self) -> KMeansOptions {
        KMeansOptions { restarts: self.restarts, iterations: self.iterations, seed: self.seed }
    }
}

pub(crate) fn unknown(option: &str, value: &str, names: &[&str]) -> Error {
    let closest = nearest(value, names.iter().copied()).unwrap_or_default();
    Error::new(ErrorCode::OptionInvalid, format!("{option} has no choice \"{value}\""))
        .subject(option)
        .hint(format!("Did you mean \"{closest}\"? The choices are {}", names.join(", ")))
}
