use std::collections::BTreeMap;

use kintsugi_merge::{
    Coordinates, Gauge, METHODS, MergeOptions, MetricFormula, RankRule, ScaleRule, SignElection, metric_weights,
};
use kintsugi_pipeline::{
    MergeChange, MergeRecipe, RankPadding, WholeModuleRule, changed_recipe, merge_adapters, plan_merge,
};
use kintsugi_runtime::{Result, ThreadPool};
use kintsugi_weights::ElementType;
use napi::Env;
use napi::bindgen_prelude::Object;
use napi_derive::napi;

use crate::control::BindingControl;
use crate::error::{invalid_option, to_napi};
use crate::job::{spawn, to_json};

/// Options of `merge`; `src/merge.ts` fills in the defaults.
#[napi(object, object_to_js = false)]
pub struct BindingMergeOptions {
    pub adapters: Vec<String>,
    pub weights: Vec<f64>,
    pub out: String,
    pub method: String,
    /// 0 for the largest rank of the adapters.
    pub rank: u32,
    /// 0 for a fixed rank.
    pub energy: f64,
    /// `uniform`, `vllm` or `none`.
    pub padding: String,
    /// `auto`, `bf16`, `f16` or `f32`.
    pub factor_type: String,
    /// `auto`, `factors`, `update`, `core` or `knots`.
    pub coordinates: String,
    pub density: f64,
    pub sign_election: String,
    pub seed: f64,
    pub restarts: u32,
    pub iterations: u32,
    pub gauge: String,
    pub normalize: bool,
    pub parameter_reweighting: bool,
    pub output_reweighting: bool,
    /// 0 for the mean rank of the adapters.
    pub reference_rank: f64,
    pub scale: String,
    pub report: bool,
    pub allow_different_bases: bool,
    /// File of saved statistics.
    pub calibration: Option<String>,
    /// Folder of a compensation.
    pub compensation: Option<String>,
    /// 0 to keep the compensation as it is.
    pub total_rank: u32,
    /// `equal`, `mean` or `refuse`.
    pub modules_to_save: String,
    pub dry_run: bool,
}

/// Options of `remerge`.
#[napi(object, object_to_js = false)]
pub struct BindingMergeChange {
    pub merged: String,
    pub add: Vec<String>,
    /// Of each that is added.
    pub weights: Vec<f64>,
    pub remove: Vec<String>,
    pub out: String,
    pub dry_run: bool,
}

/// Merges adapters; the promise gives the report, or the plan of a dry run.
#[napi(ts_return_type = "Promise<unknown>")]
pub fn merge<'env>(
    env: &'env Env,
    options: BindingMergeOptions,
    control: &BindingControl,
) -> napi::Result<Object<'env>> {
    let recipe = recipe(&options).map_err(|error| to_napi(&error))?;
    run(env, move || Ok(recipe), options.dry_run, control)
}

/// Merges anew what an earlier merge has merged, with some sources more or less.
#[napi(ts_return_type = "Promise<unknown>")]
pub fn remerge<'env>(
    env: &'env Env,
    options: BindingMergeChange,
    control: &BindingControl,
) -> napi::Result<Object<'env>> {
    let change = MergeChange {
        merged: options.merged.into(),
        add: options.add.iter().map(Into::into).zip(options.weights).collect(),
        remove: options.remove,
        out: options.out.into(),
    };
    run(env, move || changed_recipe(&change), options.dry_run, control)
}

/// Plans or runs what `recipe` gives.
fn run<'env>(
    env: &'env Env,
    recipe: impl FnOnce() -> Result<MergeRecipe> + Send + 'static,
    dry_run: bool,
    control: &BindingControl,
) -> napi::Result<Object<'env>> {
    let (cancel, progress) = (control.cancel.clone(), control.progress.clone());
    spawn(env, move || {
        let recipe = recipe()?;
        if dry_run {
            return to_json(&plan_merge(&recipe, &cancel)?);
        }
        to_json(&merge_adapters(&recipe, ThreadPool::global(), &cancel, &progress)?)
    })
}

/// Name, summary and options of every merge method, and whether it reads statistics of the inputs.
#[napi(ts_return_type = "unknown")]
pub fn merge_methods() -> serde_json::Value {
    let methods = METHODS.iter().map(|method| {
        serde_json::json!({
            "name": method.name(),
            "summary": method.summary(),
            "options": method.options(),
            "weighsInputs": method.weighs_inputs(),
        })
    });
    methods.collect()
}

/// Weights from one figure per adapter. `formula` is `softmax` (of `parameter` as temperature) or `proportional` (to
/// the power of `parameter`).
#[napi]
pub fn weights_from_metrics(
    metrics: Vec<f64>,
    lower_is_better: bool,
    formula: String,
    parameter: f64,
) -> napi::Result<Vec<f64>> {
    let formula = match formula.as_str() {
        "softmax" => Ok(MetricFormula::Softmax { temperature: parameter }),
        "proportional" => Ok(MetricFormula::Proportional { power: parameter }),
        other => Err(invalid_option("formula", other, &["softmax", "proportional"])),
    };
    formula.and_then(|formula| metric_weights(&metrics, lower_is_better, formula)).map_err(|error| to_napi(&error))
}

fn recipe(options: &BindingMergeOptions) -> Result<MergeRecipe> {
    let factor_type = match options.factor_type.as_str() {
        "auto" => None,
        name => {
            let valid = ["auto", "bf16", "f16", "f32"];
            Some(ElementType::from_name(name).ok_or_else(|| invalid_option("factorType", name, &valid))?)
        }
    };
    let rank = match (options.rank as usize, options.energy) {
        (0, 0.0) => None,
        (rank, 0.0) => Some(RankRule::Fixed(rank)),
        (0, share) => Some(RankRule::Energy { share, most: 1 << 16 }),
        (most, share) => Some(RankRule::Energy { share, most }),
    };
    Ok(MergeRecipe {
        adapters: options.adapters.iter().map(Into::into).collect(),
        weights: options.weights.clone(),
        out: options.out.clone().into(),
        method: options.method.clone(),
        options: MergeOptions {
            rank,
            factor_type: ElementType::F32,
            coordinates: match options.coordinates.as_str() {
                "auto" => None,
                name => Some(Coordinates::from_name(name)?),
            },
            density: options.density,
            sign_election: SignElection::from_name(&options.sign_election)?,
            seed: options.seed as u64,
            restarts: options.restarts as usize,
            iterations: options.iterations as usize,
            gauge: Gauge::from_name(&options.gauge)?,
            normalize: options.normalize,
            parameter_reweighting: options.parameter_reweighting,
            output_reweighting: options.output_reweighting,
            reference_rank: (options.reference_rank > 0.0).then_some(options.reference_rank),
            scale: ScaleRule::from_name(&options.scale)?,
            report: options.report,
        },
        factor_type,
        padding: RankPadding::from_name(&options.padding)?,
        allow_different_bases: options.allow_different_bases,
        calibration: options.calibration.as_ref().map(Into::into),
        compensation: options.compensation.as_ref().map(Into::into),
        total_rank: (options.total_rank > 0).then_some(options.total_rank as usize),
        modules_to_save: WholeModuleRule::from_name(&options.modules_to_save)?,
        expected: BTreeMap::new(),
    })
}
