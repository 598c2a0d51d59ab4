use std::path::PathBuf;

use kintsugi_merge::LinearMergeReport;
use serde::Serialize;

use crate::MergeRecipe;

/// What a merge did; `report.json` in the folder that was written.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct MergeReport {
    /// What was asked.
    pub recipe: MergeRecipe,
    /// The whole adapter.
    pub summary: MergeSummary,
    /// Each module, in name order.
    pub modules: Vec<ModuleMergeReport>,
}

/// The whole adapter.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct MergeSummary {
    /// Modules of the result.
    pub modules: usize,
    /// `r` of the result.
    pub rank: usize,
    /// Bytes of the weights file.
    pub bytes: u64,
    /// Bytes of the adapters' factors.
    pub source_bytes: u64,
    /// `‖M − T‖ / ‖T‖` over all modules together, T the exact weighted sum of the adapters and M their merge, before a
    /// compensation is joined and both are cut to a total rank; `null` without report.
    pub error: Option<f64>,
    /// `‖(M − T) S^½‖ / ‖T S^½‖` over the modules of whose inputs there are statistics: the error of the outputs. `null`
    /// without report or calibration.
    pub weighted_error: Option<f64>,
    /// What cutting the compensation and the merged adapters to the total rank costs; `null` without total rank.
    pub joined: Option<JoinSummary>,
    /// What is left of each adapter.
    pub adapters: Vec<AdapterShare>,
    /// Wall time.
    pub seconds: f64,
    /// Largest resident set of the process so far; `null` where the system does not tell.
    pub peak_memory_bytes: Option<u64>,
}

/// What the cut to a total rank costs, over all modules together.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct JoinSummary {
    /// `‖J − (E + M)‖ / ‖E + M‖`, as in [`JoinReport`].
    pub error: f64,
    /// The same for the outputs, over the modules of whose inputs there are statistics; `null` without calibration.
    pub weighted_error: Option<f64>,
}

/// What is left of one adapter, over all of its modules together, before a cut to a total rank.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct AdapterShare {
    /// Its folder.
    pub path: PathBuf,
    /// Its weight.
    pub weight: f64,
    /// Modules that it has factors for.
    pub modules: usize,
    /// Of scalings, shapes, a sample of its factors and of its whole modules: what a later merge of the same sources is
    /// held against.
    pub fingerprint: String,
    /// Share of its energy in the row and column spaces of the result; `null` without report.
    pub retained: Option<f64>,
    /// The multiple of it in the result; `null` without report.
    pub multiple: Option<f64>,
}

/// One module of a [`MergeReport`].
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ModuleMergeReport {
    /// Path in the base model.
    pub name: String,
    /// Rows of the update.
    pub out_features: usize,
    /// Columns of the update.
    pub in_features: usize,
    /// The adapters that have factors for it, as indices.
    pub adapters: Vec<usize>,
    /// Terms of the result, zeros that fill it up aside.
    pub rank: usize,
    /// Clustering methods: units behind each term.
    pub cluster_sizes: Vec<usize>,
    /// Clustering methods: what each centre was multiplied with.
    pub scales: Vec<f64>,
    /// What the closed-form scale multiplied the update with, else 1.
    pub scale: f64,
    /// What was kept by the merge of the adapters, a compensation aside; `null` when it was not asked for. Sources count
    /// the adapters of this module.
    pub kept: Option<LinearMergeReport>,
    /// How a compensation was joined; `null` without.
    pub joined: Option<JoinReport>,
}

/// How the compensation of a module and its merged adapters became one update.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct JoinReport {
    /// Terms of the compensation.
    pub compensation_rank: usize,
    /// Terms of the merged adapters.
    pub merged_rank: usize,
    /// `‖J − (E + M)‖ / ‖E + M‖`: what cutting the compensation E and the merged adapters M to the total rank costs; 0
    /// where both are kept.
    pub error: f64,
    /// `‖E + M‖`.
    pub sum_norm: f64,
    /// The same for the outputs; `null` without calibration.
    pub weighted_error: Option<f64>,
    /// `‖(E + M) S^½‖`; `null` without calibration.
    pub weighted_sum_norm: Option<f64>,
}

/// A relative distance of several parts together: `√(Σ ‖difference‖² / Σ ‖whole‖²)`.
#[derive(Clone, Copy, Debug, Default)]
struct Distance {
    difference: f64,
    whole: f64,
}

impl Distance {
    /// Adds a part by its relative distance, which is absolute where the norm of the whole is 0.
    fn add(&mut self, error: f64, norm: f64) {
        self.difference += (error * if norm > 0.0 { norm } else { 1.0 }).powi(2);
        self.whole += norm * norm;
    }

    fn relative(self) -> f64 {
        if self.whole > 0.0 { (self.difference / self.whole).sqrt() } else { self.difference.sqrt() }
    }
}

impl JoinSummary {
    /// The sums over the modules that something was joined in.
    pub(crate) fn new(modules: &[ModuleMergeReport]) -> Self {
        let (mut all, mut outputs) = (Distance::default(), None::<Distance>);
        for joined in modules.iter().filter_map(|module| module.joined.as_ref()) {
            all.add(joined.error, joined.sum_norm);
            if let (Some(error), Some(norm)) = (joined.weighted_error, joined.weighted_sum_norm) {
                outputs.get_or_insert_default().add(error, norm);
            }
        }
        JoinSummary { error: all.relative(), weighted_error: outputs.map(Distance::relative) }
    }
}

impl MergeSummary {
    /// The sums over `modules`; `shares` are the adapters without what the modules say about them.
    pub(crate) fn new(modules: &[ModuleMergeReport], shares: Vec<AdapterShare>, reported: bool) -> Self {
        let (mut all, mut outputs) = (Distance::default(), None::<Distance>);
        // By adapter: energy, what of it is retained, its product with the result.
        let mut sums = vec![(0.0, 0.0, 0.0); shares.len()];
        for module in modules {
            let Some(kept) = &module.kept else { continue };
            all.add(kept.error, kept.sum_norm);
            if let (Some(error), Some(norm)) = (kept.weighted_error, kept.weighted_sum_norm) {
                outputs.get_or_insert_default().add(error, norm);
            }
            for (&adapter, share) in module.adapters.iter().zip(&kept.sources) {
                let energy = share.norm * share.norm;
                let (own, retained, product) = &mut sums[adapter];
                *own += energy;
                *retained += energy * share.retained;
                *product += energy * share.multiple;
            }
        }
        let adapters = shares.into_iter().zip(&sums).map(|(share, &(own, retained, product))| AdapterShare {
            retained: (reported && own > 0.0).then(|| retained / own),
            multiple: (reported && own > 0.0).then(|| product / own),
            ..share
        });
        MergeSummary {
            modules: modules.len(),
            rank: 0,
            bytes: 0,
            source_bytes: 0,
            error: reported.then(|| all.relative()),
            weighted_error: outputs.map(Distance::relative),
            joined: None,
            adapters: adapters.collect(),
            seconds: 0.0,
            peak_memory_bytes: None,
        }
    }
}
