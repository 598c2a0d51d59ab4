use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

use kintsugi_checkpoint::{AdapterDescription, AdapterFolder, AdapterModule, AdapterWriter, MergedModule, ModuleKind};
use kintsugi_linalg::LeadingDirections;
use kintsugi_merge::{
    Coordinates, LinearMergeReport, LinearSources, MergeMethod, MergeOptions, MergeSource, MergedLinear, RankRule,
    merge_linear, merge_method,
};
use kintsugi_runtime::{
    CancelToken, Error, ErrorCode, Progress, Result, StagedFolder, ThreadPool, peak_memory_bytes, replace_file,
};
use kintsugi_weights::{ElementType, LowRank};
use serde::{Deserialize, Serialize};

use crate::factor_spill::FactorSpill;

/// Ranks that vLLM can be started for (`max_lora_rank` of its `LoRAConfig`).
pub const VLLM_RANKS: &[usize] = &[1, 8, 16, 32, 64, 128, 256, 320, 512];

/// Working memory of the Linears that are merged at one time; one is always merged.
const MEMORY: u64 = 600 << 20;

/// The rank of the modules in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RankPadding {
    /// That of the module that has most, so that readers without rank patterns are right.
    Uniform,
    /// The smallest that vLLM knows, for all modules.
    Vllm,
    /// Each module its own.
    None,
}

impl RankPadding {
    /// Every choice, as users write it.
    pub const NAMES: &'static [&'static str] = &["uniform", "vllm", "none"];

    /// The choice of that name.
    ///
    /// # Errors
    /// `ERR_OPTION_INVALID`.
    pub fn from_name(name: &str) -> Result<Self> {
        match name {
            "uniform" => Ok(RankPadding::Uniform),
            "vllm" => Ok(RankPadding::Vllm),
            "none" => Ok(RankPadding::None),
            other => Err(Error::new(ErrorCode::OptionInvalid, format!("padding has no choice \"{other}\""))
                .subject("padding")
                .hint(format!("The choices are {}", Self::NAMES.join(", ")))),
        }
    }
}

/// What the user asked for.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct MergeRecipe {
    /// PEFT folders.
    pub adapters: Vec<PathBuf>,
    /// What the update of each is multiplied with.
    pub weights: Vec<f64>,
    /// Folder that is written.
    pub out: PathBuf,
    /// Name of a merge method.
    pub method: String,
    /// What the method is told; `factor_type` beside it decides about the type.
    pub options: MergeOptions,
    /// Type of the factors; `null` for that of the adapters, f32 where they differ.
    pub factor_type: Option<ElementType>,
    /// The rank of the modules in the file.
    pub padding: RankPadding,
    /// Merge adapters whose configs name different base models.
    pub allow_different_bases: bool,
}

/// What will be merged, from configs and headers alone.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct MergePlan {
    /// What was asked.
    pub recipe: MergeRecipe,
    /// The base model that the adapters name.
    pub base_model: Option<String>,
    /// Type of the factors that are written.
    pub factor_type: ElementType,
    /// In the order of the file.
    pub modules: Vec<PlannedMerge>,
    /// Bytes of tensors that will be written; an upper bound where an energy target decides the ranks.
    pub bytes: u64,
    /// Bytes of the adapters' factors.
    pub source_bytes: u64,
    /// Estimate of the largest working set.
    pub memory_bytes: u64,
}

/// One module of a [`MergePlan`].
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PlannedMerge {
    /// Path in the base model.
    pub name: String,
    /// Rows of the update.
    pub out_features: usize,
    /// Columns of the update.
    pub in_features: usize,
    /// The adapters that have factors for it, as indices.
    pub adapters: Vec<usize>,
    /// Their ranks.
    pub ranks: Vec<usize>,
    /// Most that the rank of the result can be.
    pub rank: usize,
}

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
    /// `‖M − T‖ / ‖T‖` over all modules together, T the exact weighted sum; `null` without report.
    pub error: Option<f64>,
    /// What is left of each adapter.
    pub adapters: Vec<AdapterShare>,
    /// Wall time.
    pub seconds: f64,
    /// Largest resident set of the process so far; `null` where the system does not tell.
    pub peak_memory_bytes: Option<u64>,
}

/// What is left of one adapter, over all of its modules together.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct AdapterShare {
    /// Its folder.
    pub path: PathBuf,
    /// Its weight.
    pub weight: f64,
    /// Modules that it has factors for.
    pub modules: usize,
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
    /// What was kept; `null` when it was not asked for. Sources count the adapters of this module.
    pub kept: Option<LinearMergeReport>,
}

/// What `recipe` would do.
///
/// # Errors
/// Everything that [`merge_adapters`] refuses before it writes.
pub fn plan_merge(recipe: &MergeRecipe) -> Result<MergePlan> {
    Ok(Merging::open(recipe)?.plan)
}

/// Merges PEFT adapters into a new PEFT folder with scaling 1, module by module.
///
/// The folder appears whole or not at all. Its bytes depend on the content of the adapters, the weights and the options
/// alone: not on the order of the adapters, nor on the number of threads. Times in the report aside, that is true of
/// `report.json` for one order.
///
/// # Errors
/// `ERR_OPTION_INVALID`, `ERR_ADAPTER_INVALID`, `ERR_SHAPE_MISMATCH`, `ERR_OUTPUT_NOT_EMPTY`, `ERR_OUTPUT_UNWRITABLE`,
/// `ERR_CANCELLED`; nothing stays behind.
pub fn merge_adapters(
    recipe: &MergeRecipe,
    pool: &ThreadPool,
    cancel: &CancelToken,
    progress: &Progress,
) -> Result<MergeReport> {
    let started = Instant::now();
    let merging = Merging::open(recipe)?;
    let plan = &merging.plan;
    progress.begin("merge", plan.modules.len() as u64);
    let mut reports = Vec::with_capacity(plan.modules.len());
    let (writer, rank) = if merging.ranks_are_known() {
        let modules = merging.written_modules(|index| plan.modules[index].rank)?;
        let rank = modules.iter().map(|module| module.rank).max().unwrap_or(0);
        let mut writer = AdapterWriter::create(&recipe.out, merging.description(), modules)?;
        let order = merging.in_order(writer.modules());
        merging.run(&order, pool, cancel, progress, |index, merged| {
            writer.write(merged.factors.as_ref())?;
            reports.push(merging.module_report(index, merged));
            Ok(())
        })?;
        (writer, rank)
    } else {
        let mut spill = FactorSpill::create(&recipe.out)?;
        let mut ranks = vec![1; plan.modules.len()];
        let order: Vec<usize> = (0..plan.modules.len()).collect();
        merging.run(&order, pool, cancel, progress, |index, merged| {
            spill.push(merged.factors.as_ref())?;
            ranks[index] = merged.factors.as_ref().map_or(1, LowRank::rank);
            reports.push(merging.module_report(index, merged));
            Ok(())
        })?;
        progress.at("write", "");
        let modules = merging.written_modules(|index| ranks[index])?;
        let rank = modules.iter().map(|module| module.rank).max().unwrap_or(0);
        let mut writer = AdapterWriter::create(&recipe.out, merging.description(), modules)?;
        for index in merging.in_order(writer.modules()) {
            cancel.check()?;
            let module = &plan.modules[index];
            let factors = spill.read(index, module.out_features, module.in_features, plan.factor_type)?;
            writer.write(factors.as_ref())?;
        }
        (writer, rank)
    };
    reports.sort_by(|left, right| left.name.cmp(&right.name));
    let mut report = merging.report(reports, rank);
    report.summary.seconds = started.elapsed().as_secs_f64();
    report.summary.peak_memory_bytes = peak_memory_bytes();
    report.summary.bytes = writer.total_bytes();
    let text = serde_json::to_string_pretty(&report)
        .map_err(|error| Error::new(ErrorCode::Internal, format!("the report cannot be written: {error}")))?;
    replace_file(&writer.folder().join("report.json"), text.as_bytes())?;
    cancel.check()?;
    writer.finish()?;
    Ok(report)
}

/// Adapters that fit together, and what becomes of them.
struct Merging<'a> {
    recipe: &'a MergeRecipe,
    method: &'static dyn MergeMethod,
    options: MergeOptions,
    folders: Vec<AdapterFolder>,
    kinds: Vec<ModuleKind>,
    plan: MergePlan,
}

impl<'a> Merging<'a> {
    fn open(recipe: &'a MergeRecipe) -> Result<Self> {
        let method = merge_method(&recipe.method)?;
        recipe.options.validate()?;
        check_weights(recipe)?;
        // Looks whether the output may be written, and leaves what an earlier run kept there alone.
        StagedFolder::reopen(&recipe.out)?;
        let folders: Vec<AdapterFolder> =
            recipe.adapters.iter().map(|path| AdapterFolder::open(path)).collect::<Result<_>>()?;
        let base_model = common_base(recipe, &folders)?;
        let factor_type = recipe.factor_type.unwrap_or_else(|| common_type(&folders));
        let modules = union(&folders)?;
        let largest = modules.values().flatten().map(|(_, module)| module.rank).max().unwrap_or(0);
        let pairs = method.keeps_rank()
            || (recipe.options.coordinates == Some(Coordinates::Factors) && method.options().contains(&"coordinates"));
        let rank = match (pairs && recipe.adapters.len() > 1, recipe.options.rank) {
            (true, rule) => rule.filter(|_| !method.keeps_rank()),
            (false, rule) => Some(rule.unwrap_or(RankRule::Fixed(largest))),
        };
        // An energy target is no rank: vLLM limits it as `rank` would.
        let rank = match rank {
            Some(RankRule::Energy { share, most }) if recipe.padding == RankPadding::Vllm => {
                Some(RankRule::Energy { share, most: most.min(VLLM_RANKS[VLLM_RANKS.len() - 1]) })
            }
            rank => rank,
        };
        let options = MergeOptions { factor_type, rank, ..recipe.options.clone() };
        let (mut planned, mut kinds, mut memory, mut source_bytes) = (Vec::new(), Vec::new(), 0, 0);
        for (name, sources) in modules {
            let first = sources[0].1;
            let ranks: Vec<usize> = sources.iter().map(|(_, module)| module.rank).collect();
            let (out_features, in_features) = (first.out_features, first.in_features);
            let asked = options.rank.map_or(usize::MAX, RankRule::most);
            let of_method = if pairs && !method.keeps_rank() {
                ranks.iter().copied().max().unwrap_or(0)
            } else {
                method.rank_of(&ranks, out_features.min(in_features))
            };
            let rank = of_method.min(asked);
            memory = memory.max(working_bytes(method, &ranks, out_features, in_features, rank));
            for (_, module) in &sources {
                let values = module.rank * (out_features + in_features);
                source_bytes += (values * module.element_type.bits() / 8) as u64;
            }
            kinds.push(first.kind);
            planned.push(PlannedMerge {
                name: name.to_string(),
                out_features,
                in_features,
                adapters: sources.iter().map(|(index, _)| *index).collect(),
                ranks,
                rank,
            });
        }
        let plan = MergePlan {
            recipe: recipe.clone(),
            base_model,
            factor_type,
            modules: planned,
            bytes: 0,
            source_bytes,
            memory_bytes: memory,
        };
        let mut merging = Merging { recipe, method, options, folders, kinds, plan };
        let written = merging.written_modules(|index| merging.plan.modules[index].rank)?;
        merging.plan.bytes = written
            .iter()
            .map(|module| module.rank * (module.out_features + module.in_features) * factor_type.bits() / 8)
            .sum::<usize>() as u64;
        Ok(merging)
    }

    /// Whether the ranks of the file stand before anything is merged.
    fn ranks_are_known(&self) -> bool {
        !matches!(self.options.rank, Some(RankRule::Energy { .. }))
    }

    /// The modules of the file, for the ranks of the merged ones.
    fn written_modules(&self, rank: impl Fn(usize) -> usize) -> Result<Vec<MergedModule>> {
        let largest = (0..self.plan.modules.len()).map(&rank).max().unwrap_or(0);
        let common = match self.recipe.padding {
            RankPadding::None => None,
            RankPadding::Uniform => Some(largest),
            RankPadding::Vllm => Some(VLLM_RANKS.iter().copied().find(|&known| known >= largest).ok_or_else(|| {
                Error::new(ErrorCode::OptionInvalid, format!("rank {largest} is more than vLLM serves"))
                    .subject("padding")
                    .hint(format!("Merge with svd or lego at a rank of at most {}", VLLM_RANKS[VLLM_RANKS.len() - 1]))
            })?),
        };
        Ok(self
            .plan
            .modules
            .iter()
            .enumerate()
            .map(|(index, module)| MergedModule {
                name: module.name.clone(),
                kind: self.kinds[index],
                out_features: module.out_features,
                in_features: module.in_features,
                rank: common.unwrap_or_else(|| rank(index)),
            })
            .collect())
    }

    fn in_order(&self, written: &[MergedModule]) -> Vec<usize> {
        let places: BTreeMap<&str, usize> =
            self.plan.modules.iter().enumerate().map(|(index, module)| (module.name.as_str(), index)).collect();
        written.iter().map(|module| places[module.name.as_str()]).collect()
    }

    fn description(&self) -> AdapterDescription {
        let first = &self.folders[0];
        let task = first.task_type().filter(|task| self.folders.iter().all(|f| f.task_type() == Some(task)));
        AdapterDescription {
            base_model: self.plan.base_model.clone(),
            task_type: task.map(str::to_string),
            fan_in_fan_out: first.fan_in_fan_out(),
            targets_by_suffix: self.folders.iter().all(AdapterFolder::targets_by_suffix),
            element_type: self.plan.factor_type,
        }
    }

    /// Merges the modules in this order and hands each to `put`. Several are merged at a time, as memory allows.
    fn run(
        &self,
        order: &[usize],
        pool: &ThreadPool,
        cancel: &CancelToken,
        progress: &Progress,
        mut put: impl FnMut(usize, MergedLinear) -> Result<()>,
    ) -> Result<()> {
        let together = ((MEMORY / self.plan.memory_bytes.max(1)) as usize).clamp(1, pool.threads());
        for part in order.chunks(together) {
            cancel.check()?;
            progress.at("merge", self.plan.modules[part[0]].name.clone());
            let merged = pool.map(part.len(), |i| {
                cancel.check()?;
                self.merge(part[i], pool)
            });
            for (&index, merged) in part.iter().zip(merged) {
                put(index, merged?)?;
                progress.advance(1);
            }
        }
        Ok(())
    }

    fn merge(&self, index: usize, pool: &ThreadPool) -> Result<MergedLinear> {
        let module = &self.plan.modules[index];
        let factors: Vec<LowRank> = module
            .adapters
            .iter()
            .map(|&adapter| self.folders[adapter].factors(&module.name))
            .collect::<Result<_>>()?;
        let sources: Vec<MergeSource<'_>> = module
            .adapters
            .iter()
            .zip(&factors)
            .map(|(&adapter, factors)| MergeSource {
                factors,
                scaling: self.folders[adapter].module(&module.name).map_or(0.0, |module| module.scaling),
                weight: self.recipe.weights[adapter],
            })
            .collect();
        let linear = LinearSources::new(&module.name, &sources, self.folders.len())?;
        merge_linear(self.method, &linear, &self.options, pool)
    }

    fn module_report(&self, index: usize, merged: MergedLinear) -> ModuleMergeReport {
        let module = &self.plan.modules[index];
        ModuleMergeReport {
            name: module.name.clone(),
            out_features: module.out_features,
            in_features: module.in_features,
            adapters: module.adapters.clone(),
            rank: merged.factors.as_ref().map_or(0, LowRank::rank),
            cluster_sizes: merged.cluster_sizes,
            scales: merged.scales,
            scale: merged.scale,
            kept: merged.report,
        }
    }

    fn report(&self, modules: Vec<ModuleMergeReport>, rank: usize) -> MergeReport {
        let (mut wrong, mut total) = (0.0, 0.0);
        // By adapter: energy, what of it is retained, its product with the result.
        let mut shares = vec![(0.0, 0.0, 0.0); self.folders.len()];
        for module in &modules {
            let Some(kept) = &module.kept else { continue };
            let norm = kept.sum_norm;
            wrong += (kept.error * if norm > 0.0 { norm } else { 1.0 }).powi(2);
            total += norm * norm;
            for (&adapter, share) in module.adapters.iter().zip(&kept.sources) {
                let energy = share.norm * share.norm;
                let (all, retained, product) = &mut shares[adapter];
                *all += energy;
                *retained += energy * share.retained;
                *product += energy * share.multiple;
            }
        }
        let reported = self.options.report;
        let adapters = self.folders.iter().zip(&self.recipe.weights).zip(&shares);
        let adapters = adapters.map(|((folder, &weight), &(all, retained, product))| AdapterShare {
            path: folder.path().to_path_buf(),
            weight,
            modules: folder.modules().len(),
            retained: (reported && all > 0.0).then(|| retained / all),
            multiple: (reported && all > 0.0).then(|| product / all),
        });
        MergeReport {
            recipe: self.recipe.clone(),
            summary: MergeSummary {
                modules: modules.len(),
                rank,
                bytes: 0,
                source_bytes: self.plan.source_bytes,
                error: reported.then(|| if total > 0.0 { (wrong / total).sqrt() } else { wrong.sqrt() }),
                adapters: adapters.collect(),
                seconds: 0.0,
                peak_memory_bytes: None,
            },
            modules,
        }
    }
}

fn check_weights(recipe: &MergeRecipe) -> Result<()> {
    let invalid = |message: String, subject: &str, hint: &str| {
        Err(Error::new(ErrorCode::OptionInvalid, message).subject(subject).hint(hint))
    };
    if recipe.adapters.is_empty() {
        return invalid("there is nothing to merge".into(), "adapters", "Give at least one adapter folder");
    }
    if recipe.weights.len() != recipe.adapters.len() {
        let message = format!("{} weights for {} adapters", recipe.weights.len(), recipe.adapters.len());
        return invalid(message, "weights", "Give one weight for each adapter");
    }
    match recipe.weights.iter().find(|weight| !weight.is_finite()) {
        Some(weight) => invalid(format!("a weight is {weight}"), "weights", "Give finite numbers"),
        None => Ok(()),
    }
}

/// The base model that all adapters name; those that name none fit any.
fn common_base(recipe: &MergeRecipe, folders: &[AdapterFolder]) -> Result<Option<String>> {
    let invalid = |folder: &AdapterFolder, message: String, hint: &str| {
        Error::new(ErrorCode::AdapterInvalid, message).subject(folder.path().display()).hint(hint)
    };
    let first = folders[0].fan_in_fan_out();
    if let Some(folder) = folders.iter().find(|folder| folder.fan_in_fan_out() != first) {
        let message = "'fan_in_fan_out' is not what another adapter says".to_string();
        return Err(invalid(folder, message, "Merge adapters that were trained on the same base model"));
    }
    let named = || folders.iter().filter_map(|folder| Some((folder, folder.base_model()?)));
    // Where they may differ, one name that does not depend on the order of the adapters.
    let Some(base) = named().map(|(_, base)| base).min() else { return Ok(None) };
    if let Some((folder, other)) = named().find(|(_, other)| *other != base)
        && !recipe.allow_different_bases
    {
        let message = format!("the adapter belongs to '{other}', another to '{base}'");
        return Err(invalid(folder, message, "Allow different bases if they are copies of one model"));
    }
    Ok(Some(base.to_string()))
}

fn common_type(folders: &[AdapterFolder]) -> ElementType {
    let mut types = folders.iter().flat_map(AdapterFolder::modules).map(|module| module.element_type);
    let first = types.next().unwrap_or(ElementType::F32);
    if types.all(|element_type| element_type == first) { first } else { ElementType::F32 }
}

/// The modules of all adapters, each with the adapters that have it.
fn union(folders: &[AdapterFolder]) -> Result<BTreeMap<&str, Vec<(usize, &AdapterModule)>>> {
    let mut modules: BTreeMap<&str, Vec<(usize, &AdapterModule)>> = BTreeMap::new();
    for (index, folder) in folders.iter().enumerate() {
        for module in folder.modules() {
            let sources = modules.entry(&module.name).or_default();
            if let Some((_, first)) = sources.first() {
                let shape = |module: &AdapterModule| (module.kind, module.out_features, module.in_features);
                if shape(first) != shape(module) {
                    let message = format!(
                        "'{}' is {}×{} here and {}×{} in another adapter",
                        module.name, module.out_features, module.in_features, first.out_features, first.in_features
                    );
                    return Err(Error::new(ErrorCode::ShapeMismatch, message)
                        .subject(folder.path().display())
                        .hint("Merge adapters that were trained on the same base model"));
                }
            }
            sources.push((index, module));
        }
    }
    Ok(modules)
}

/// An estimate of what merging one module needs.
fn working_bytes(
    method: &dyn MergeMethod,
    ranks: &[usize],
    out_features: usize,
    in_features: usize,
    rank: usize,
) -> u64 {
    let units = ranks.iter().sum::<usize>() as u64;
    let sides = units * (out_features + in_features) as u64;
    // Factors as read and as units in f32, the result in f64; Gram matrices, Cholesky factors, core, eigenvectors.
    let mut bytes = 16 * sides + 8 * 8 * units * units;
    if method.options().contains(&"density") {
        let (rows, columns) = (out_features.min(in_features), out_features.max(in_features));
        let dense = (rows as u64).saturating_mul(4 * columns as u64);
        bytes = bytes.saturating_add(dense).saturating_add(LeadingDirections::working_bytes(rows, columns, rank));
    }
    bytes
}
