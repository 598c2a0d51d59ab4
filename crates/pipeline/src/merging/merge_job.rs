use std::collections::BTreeMap;
use std::time::Instant;

use kintsugi_checkpoint::{AdapterDescription, AdapterFolder, AdapterWriter, MergedModule, ModuleKind, saved_whole};
use kintsugi_linalg::{LeadingDirections, UpperTriangle};
use kintsugi_merge::{
    Coordinates, LinearMergeReport, LinearSources, MergeMethod, MergeOptions, MergeSource, RankRule, ScaleRule,
    StoredCat, Svd, check_statistics, join, merge_linear, merge_method, sum_norms,
};
use kintsugi_runtime::{
    CancelToken, Error, ErrorCode, Progress, Result, StagedFolder, ThreadPool, peak_memory_bytes, replace_file,
};
use kintsugi_weights::{ElementType, LowRank};

use super::factor_spill::FactorSpill;
use super::input_statistics::InputStatistics;
use super::merge_picture::merge_picture;
use super::source_print::SourcePrint;
use super::united_module::{UnitedModule, union};
use super::whole_modules::WholeModules;
use super::{
    AdapterShare, JoinReport, JoinSummary, MergePlan, MergeRecipe, MergeReport, MergeSummary, ModuleMergeReport,
    PlannedMerge, RankPadding, VLLM_RANKS, WholeModuleRule,
};

/// Working memory of the Linears that are merged at one time; one is always merged.
const MEMORY: u64 = 600 << 20;

/// What `recipe` would do.
///
/// # Errors
/// Everything that [`merge_adapters`] refuses before it reads factors.
pub fn plan_merge(recipe: &MergeRecipe, cancel: &CancelToken) -> Result<MergePlan> {
    Ok(MergeJob::open(recipe, cancel)?.plan)
}

/// Merges PEFT adapters into a new PEFT folder with scaling 1, module by module.
///
/// The folder appears whole or not at all. The bytes of its weights and config depend on the content of the adapters, the
/// weights and the options alone: not on the order of the adapters, nor on the number of threads. Times in the report
/// aside, that is true of `report.json` for one order.
///
/// # Errors
/// `ERR_OPTION_INVALID`, `ERR_ADAPTER_INVALID`, `ERR_SHAPE_MISMATCH`, `ERR_STATISTICS_MISMATCH`, `ERR_OUTPUT_NOT_EMPTY`,
/// `ERR_OUTPUT_UNWRITABLE`, `ERR_CANCELLED`; nothing stays behind.
pub fn merge_adapters(
    recipe: &MergeRecipe,
    pool: &ThreadPool,
    cancel: &CancelToken,
    progress: &Progress,
) -> Result<MergeReport> {
    let started = Instant::now();
    let job = MergeJob::open(recipe, cancel)?;
    let plan = &job.plan;
    progress.begin("merge", plan.modules.len() as u64);
    let mut reports = Vec::with_capacity(plan.modules.len());
    let mut prints = vec![Vec::new(); plan.modules.len()];
    let (mut writer, rank) = if job.ranks_are_known() {
        let (mut writer, rank) = job.writer(|index| plan.modules[index].rank)?;
        let order = job.in_order(writer.modules());
        let mut cat = StoredCat::new();
        let stored = if job.moves_bytes()? { order.as_slice() } else { &[] };
        for &index in stored {
            cancel.check()?;
            progress.at("merge", plan.modules[index].name.clone());
            job.write_whole(&mut writer, cancel)?;
            prints[index] = job.concatenate(index, &mut cat, &mut writer, pool)?;
            reports.push(job.empty_report(index));
            progress.advance(1);
        }
        job.run(&order[stored.len()..], pool, cancel, progress, |index, merged| {
            job.write_whole(&mut writer, cancel)?;
            writer.write(merged.factors.as_ref())?;
            prints[index] = merged.prints;
            reports.push(merged.report);
            Ok(())
        })?;
        (writer, rank)
    } else {
        let mut spill = FactorSpill::create(&recipe.out)?;
        let mut ranks = vec![1; plan.modules.len()];
        let order: Vec<usize> = (0..plan.modules.len()).collect();
        job.run(&order, pool, cancel, progress, |index, merged| {
            spill.push(merged.factors.as_ref())?;
            ranks[index] = merged.factors.as_ref().map_or(1, LowRank::rank);
            prints[index] = merged.prints;
            reports.push(merged.report);
            Ok(())
        })?;
        progress.at("write", "");
        let (mut writer, rank) = job.writer(|index| ranks[index])?;
        for index in job.in_order(writer.modules()) {
            cancel.check()?;
            let module = &plan.modules[index];
            let factors = spill.read(index, module.out_features, module.in_features, plan.factor_type)?;
            job.write_whole(&mut writer, cancel)?;
            writer.write(factors.as_ref())?;
        }
        (writer, rank)
    };
    job.write_whole(&mut writer, cancel)?;
    reports.sort_by(|left, right| left.name.cmp(&right.name));
    let shares = job.shares(&prints)?;
    let mut summary = MergeSummary::new(&reports, shares, job.options.report);
    summary.joined = recipe.total_rank.map(|_| JoinSummary::new(&reports));
    summary.rank = rank;
    summary.source_bytes = plan.source_bytes;
    summary.seconds = started.elapsed().as_secs_f64();
    summary.peak_memory_bytes = peak_memory_bytes();
    summary.bytes = writer.total_bytes();
    let report = MergeReport { recipe: recipe.clone(), summary, modules: reports };
    let text = serde_json::to_string_pretty(&report).map_err(|error| {
        Error::new(ErrorCode::Internal, format!("the report cannot be written: {error}"))
            .subject("report.json")
            .hint("Report this as a bug, with the options of the merge")
    })?;
    replace_file(&writer.folder().join("report.json"), text.as_bytes())?;
    if job.options.report {
        replace_file(&writer.folder().join("report.svg"), merge_picture(&report).as_bytes())?;
    }
    cancel.check()?;
    writer.finish()?;
    Ok(report)
}

/// What became of a module.
struct MergedFactors {
    /// `None` where nothing is left.
    factors: Option<LowRank>,
    report: ModuleMergeReport,
    /// Of each of its adapters.
    prints: Vec<SourcePrint>,
}

/// Adapters that fit together, and what becomes of them.
pub(super) struct MergeJob<'a> {
    pub(super) recipe: &'a MergeRecipe,
    pub(super) method: &'static dyn MergeMethod,
    pub(super) options: MergeOptions,
    pub(super) folders: Vec<AdapterFolder>,
    pub(super) compensation: Option<AdapterFolder>,
    statistics: Option<InputStatistics>,
    whole: WholeModules,
    kinds: Vec<ModuleKind>,
    pub(super) plan: MergePlan,
}

impl<'a> MergeJob<'a> {
    fn open(recipe: &'a MergeRecipe, cancel: &CancelToken) -> Result<Self> {
        let method = merge_method(&recipe.method)?;
        recipe.validate()?;
        if recipe.calibration.is_some() && recipe.total_rank.is_none() {
            check_statistics(method, recipe.options.scale)?;
        }
        // Looks whether the output may be written, and leaves what an earlier run kept there alone.
        StagedFolder::reopen(&recipe.out)?;
        let open = match recipe.modules_to_save {
            WholeModuleRule::Refuse => AdapterFolder::open,
            WholeModuleRule::Equal | WholeModuleRule::Mean => AdapterFolder::open_with_whole_modules,
        };
        let folders: Vec<AdapterFolder> = recipe.adapters.iter().map(|path| open(path)).collect::<Result<_>>()?;
        let compensation = recipe.compensation.as_deref().map(AdapterFolder::open).transpose()?;
        let base_model = common_base(recipe, &folders, compensation.as_ref())?;
        let all = || folders.iter().chain(&compensation);
        let factor_type = recipe.factor_type.unwrap_or_else(|| common_type(all()));
        let whole = WholeModules::plan(&folders, &recipe.weights, recipe.modules_to_save, cancel)?;
        if recipe.padding == RankPadding::Vllm && !whole.tensors().is_empty() {
            return Err(Error::new(ErrorCode::OptionInvalid, "vLLM serves no adapters that hold whole modules")
                .subject("padding")
                .hint("Leave padding out, or merge adapters without modules_to_save"));
        }
        let modules = union(&folders, compensation.as_ref())?;
        if let Some((module, name)) =
            modules.keys().find_map(|module| Some((*module, saved_whole(whole.names(), module)?)))
        {
            let message = format!(
                "the module has factors and is also saved whole, as '{name}': PEFT would replace it and leave the factors \
                 out"
            );
            return Err(Error::new(ErrorCode::AdapterInvalid, message)
                .subject(module)
                .hint("Leave one of these adapters out, or fold one into the base model first"));
        }
        let statistics = match &recipe.calibration {
            Some(path) => {
                let widths = modules.iter().filter(|(_, module)| module.kind == ModuleKind::Linear);
                Some(InputStatistics::open(path, widths.map(|(name, module)| (*name, module.in_features)))?)
            }
            None => None,
        };
        let largest = modules.values().flat_map(|module| &module.ranks).copied().max().unwrap_or(0);
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
        let (mut planned, mut kinds, mut memory) = (Vec::new(), Vec::new(), 0);
        let mut source_bytes = 0;
        for (name, module) in modules {
            let UnitedModule { kind, out_features, in_features, adapters, ranks, compensation_rank, bytes } = module;
            let smaller_side = out_features.min(in_features);
            let asked = options.rank.map_or(usize::MAX, RankRule::most);
            let of_method = if pairs && !method.keeps_rank() {
                ranks.iter().copied().max().unwrap_or(0)
            } else {
                method.rank_of(&ranks, smaller_side)
            };
            let merged = if ranks.is_empty() { 0 } else { of_method.min(asked) };
            let joined = merged + compensation_rank;
            let rank = recipe.total_rank.map_or(joined, |most| joined.min(smaller_side).min(most));
            let weighted = statistics.as_ref().is_some_and(|statistics| statistics.has(name));
            let mut needed = working_bytes(method, &ranks, out_features, in_features, merged);
            if recipe.total_rank.is_some() {
                needed = needed.max(working_bytes(&Svd, &[joined], out_features, in_features, rank));
            }
            if weighted {
                let units = ranks.iter().sum::<usize>().max(joined) as u64;
                needed += UpperTriangle::<f64>::bytes(in_features) + 16 * units * in_features as u64;
            }
            memory = memory.max(needed);
            source_bytes += bytes;
            kinds.push(kind);
            let name = name.to_string();
            planned.push(PlannedMerge {
                name,
                out_features,
                in_features,
                adapters,
                ranks,
                compensation_rank,
                weighted,
                rank,
            });
        }
        let plan = MergePlan {
            recipe: recipe.clone(),
            base_model,
            factor_type,
            modules: planned,
            whole_tensors: whole.tensors().iter().map(|tensor| tensor.name.clone()).collect(),
            bytes: 0,
            source_bytes,
            memory_bytes: memory,
        };
        let mut job = MergeJob { recipe, method, options, folders, compensation, statistics, whole, kinds, plan };
        let factors: usize = (job.written_modules(|index| job.plan.modules[index].rank)?.iter())
            .map(|module| module.rank * (module.out_features + module.in_features) * factor_type.bits() / 8)
            .sum();
        job.plan.bytes = factors as u64 + job.whole.tensors().iter().map(|tensor| tensor.bytes).sum::<u64>();
        Ok(job)
    }

    /// Whether the ranks of the file stand before anything is merged.
    fn ranks_are_known(&self) -> bool {
        !matches!(self.options.rank, Some(RankRule::Energy { .. }))
    }

    /// The modules of the file, for the ranks of the merged ones.
    fn written_modules(&self, rank: impl Fn(usize) -> usize) -> Result<Vec<MergedModule>> {
        let largest = (0..self.plan.modules.len()).map(&rank).max().unwrap_or(0);
        let common = self.recipe.padding.common_rank(largest)?;
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

    /// Begins the output for these ranks; also gives the largest.
    fn writer(&self, rank: impl Fn(usize) -> usize) -> Result<(AdapterWriter, usize)> {
        let modules = self.written_modules(rank)?;
        let largest = modules.iter().map(|module| module.rank).max().unwrap_or(0);
        let writer = AdapterWriter::create(&self.recipe.out, self.description(), modules, self.whole.tensors())?;
        Ok((writer, largest))
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
            targets_by_suffix: self.folders.iter().chain(&self.compensation).all(AdapterFolder::targets_by_suffix),
            element_type: self.plan.factor_type,
            modules_to_save: self.whole.names().to_vec(),
        }
    }

    /// Writes the whole tensors that come next in the file.
    fn write_whole(&self, writer: &mut AdapterWriter, cancel: &CancelToken) -> Result<()> {
        writer.write_whole(|tensor, put| self.whole.copy(&self.folders, tensor, cancel, put))
    }

    /// Merges the modules in this order and hands each to `put`. Several are merged at a time, as memory allows.
    fn run(
        &self,
        order: &[usize],
        pool: &ThreadPool,
        cancel: &CancelToken,
        progress: &Progress,
        mut put: impl FnMut(usize, MergedFactors) -> Result<()>,
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

    fn merge(&self, index: usize, pool: &ThreadPool) -> Result<MergedFactors> {
        let module = &self.plan.modules[index];
        let mut report = self.empty_report(index);
        let mut prints = Vec::with_capacity(module.adapters.len());
        let mut sources = Vec::with_capacity(module.adapters.len());
        for &adapter in &module.adapters {
            let scaling = self.scaling(adapter, module);
            let [a, b] = self.folders[adapter].stored_factors(&module.name)?;
            prints.push(SourcePrint::of_module(&module.name, scaling, [&a, &b])?);
            let factor_type = if a.element_type() == b.element_type() { a.element_type() } else { ElementType::F32 };
            let factors = LowRank::new(b.rows(), a.columns(), a.rows(), b.to_f32(), a.to_f32(), factor_type);
            sources.push((factors, scaling, self.recipe.weights[adapter]));
        }
        let second_moment = match &self.statistics {
            Some(statistics) => statistics.second_moment(&module.name, module.in_features)?,
            None => None,
        };
        // What will be cut is rounded once, after the cut.
        let factor_type = if self.recipe.total_rank.is_some() { ElementType::F32 } else { self.plan.factor_type };
        let options = MergeOptions { factor_type, ..self.options.clone() };
        let mut merged = None;
        if !sources.is_empty() {
            let plain = sources.iter().map(|(factors, scaling, weight)| MergeSource {
                factors,
                scaling: *scaling,
                weight: *weight,
            });
            let mut linear = LinearSources::new(&module.name, &plain.collect::<Vec<_>>(), self.folders.len())?;
            if let Some(second_moment) = &second_moment
                && check_statistics(self.method, self.options.scale).is_ok()
            {
                linear = linear.weighted_by(second_moment)?;
            }
            let found = merge_linear(self.method, &linear, &options, pool)?;
            report.cluster_sizes = found.cluster_sizes;
            report.scales = found.scales;
            report.scale = found.scale;
            report.kept = found.report;
            merged = found.factors;
        }
        if self.compensation.is_some() {
            let (joined, how) = self.join(module, merged, second_moment.as_deref(), pool)?;
            report.joined = Some(how);
            merged = joined;
        }
        report.rank = merged.as_ref().map_or(0, LowRank::rank);
        Ok(MergedFactors { factors: merged, report, prints })
    }

    /// The report of a module of which nothing is known but the plan.
    fn empty_report(&self, index: usize) -> ModuleMergeReport {
        let module = &self.plan.modules[index];
        ModuleMergeReport {
            name: module.name.clone(),
            out_features: module.out_features,
            in_features: module.in_features,
            adapters: module.adapters.clone(),
            rank: module.rank,
            cluster_sizes: Vec::new(),
            scales: Vec::new(),
            scale: 1.0,
            kept: None,
            joined: None,
        }
    }

    pub(super) fn scaling(&self, adapter: usize, module: &PlannedMerge) -> f64 {
        self.folders[adapter].module(&module.name).map_or(0.0, |module| module.scaling)
    }

    /// The compensation of a module and its merged adapters as one update.
    fn join(
        &self,
        module: &PlannedMerge,
        merged: Option<LowRank>,
        second_moment: Option<&UpperTriangle<f64>>,
        pool: &ThreadPool,
    ) -> Result<(Option<LowRank>, JoinReport)> {
        let entry = self.compensation.as_ref().and_then(|folder| Some((folder, folder.module(&module.name)?)));
        let compensation =
            entry.map(|(folder, entry)| Ok((folder.factors(&entry.name)?, entry.scaling))).transpose()?;
        let mut report = JoinReport {
            compensation_rank: module.compensation_rank,
            merged_rank: merged.as_ref().map_or(0, LowRank::rank),
            error: 0.0,
            sum_norm: 0.0,
            weighted_error: second_moment.map(|_| 0.0),
            weighted_sum_norm: second_moment.map(|_| 0.0),
        };
        let parts: Vec<MergeSource<'_>> = compensation
            .iter()
            .map(|(factors, scaling)| (factors, *scaling))
            .chain(merged.iter().map(|factors| (factors, 1.0)))
            .map(|(factors, scaling)| MergeSource { factors, scaling, weight: 1.0 })
            .collect();
        if parts.is_empty() {
            return Ok((None, report));
        }
        let mut linear = LinearSources::new(&module.name, &parts, parts.len())?;
        if let Some(second_moment) = second_moment {
            linear = linear.weighted_by(second_moment)?;
        }
        let rank: usize = parts.iter().map(|part| part.factors.rank()).sum();
        // The plan has room for no more than the smaller side, whatever was asked for.
        let Some(total) = self.recipe.total_rank.map(|_| module.rank).filter(|&most| most < rank) else {
            (report.sum_norm, report.weighted_sum_norm) = sum_norms(&linear, pool);
            return Ok((join(&module.name, &parts, self.plan.factor_type)?, report));
        };
        let options = MergeOptions {
            rank: Some(RankRule::Fixed(total)),
            factor_type: self.plan.factor_type,
            scale: ScaleRule::Method,
            report: true,
            ..MergeOptions::default()
        };
        let found = merge_linear(&Svd, &linear, &options, pool)?;
        if let Some(LinearMergeReport { error, sum_norm, weighted_error, weighted_sum_norm, .. }) = found.report {
            report = JoinReport { error, sum_norm, weighted_error, weighted_sum_norm, ..report };
        }
        Ok((found.factors, report))
    }

    /// What is known about the adapters without the modules' reports. `prints` are those of the adapters of each module.
    fn shares(&self, prints: &[Vec<SourcePrint>]) -> Result<Vec<AdapterShare>> {
        let mut all = vec![SourcePrint::new(); self.folders.len()];
        for (module, prints) in self.plan.modules.iter().zip(prints) {
            for (&adapter, &print) in module.adapters.iter().zip(prints) {
                all[adapter] = all[adapter].then(print);
            }
        }
        for (folder, print) in self.folders.iter().zip(&mut all) {
            for tensor in folder.whole_tensors() {
                *print = print.then(SourcePrint::of_whole(folder, tensor)?);
            }
        }
        let adapters = self.folders.iter().zip(&self.recipe.adapters).zip(&self.recipe.weights).zip(all);
        adapters
            .map(|(((folder, path), &weight), print)| {
                let fingerprint = print.to_string();
                if self.recipe.expected.get(path).is_some_and(|expected| *expected != fingerprint) {
                    let message =
                        "the adapter is not the one that was merged before: its factors or whole modules have changed";
                    return Err(Error::new(ErrorCode::AdapterInvalid, message)
                        .subject(path.display())
                        .hint("Put the earlier state back, or make a new merge"));
                }
                Ok(AdapterShare {
                    path: path.clone(),
                    weight,
                    modules: folder.modules().len(),
                    fingerprint,
                    retained: None,
                    multiple: None,
                })
            })
            .collect()
    }
}

/// The base model that the result is for: the compressed one of a compensation, else the one that all adapters name;
/// those that name none fit any.
fn common_base(
    recipe: &MergeRecipe,
    folders: &[AdapterFolder],
    compensation: Option<&AdapterFolder>,
) -> Result<Option<String>> {
    let invalid = |folder: &AdapterFolder, message: String, hint: &str| {
        Error::new(ErrorCode::AdapterInvalid, message).subject(folder.path().display()).hint(hint)
    };
    let first = folders[0].fan_in_fan_out();
    if let Some(folder) = folders.iter().chain(compensation).find(|folder| folder.fan_in_fan_out() != first) {
        let message = "'fan_in_fan_out' is not what another adapter says".to_string();
        return Err(invalid(folder, message, "Merge adapters that were trained on the same base model"));
    }
    let named = || folders.iter().filter_map(|folder| Some((folder, folder.base_model()?)));
    let of_compensation = compensation.and_then(AdapterFolder::base_model).map(str::to_string);
    // Where they may differ, one name that does not depend on the order of the adapters.
    let Some(base) = named().map(|(_, base)| base).min() else { return Ok(of_compensation) };
    if let Some((folder, other)) = named().find(|(_, other)| *other != base)
        && !recipe.allow_different_bases
    {
        let message = format!("the adapter belongs to '{other}', another to '{base}'");
        return Err(invalid(folder, message, "Allow different bases if they are copies of one model"));
    }
    Ok(of_compensation.or_else(|| Some(base.to_string())))
}

fn common_type<'a>(folders: impl Iterator<Item = &'a AdapterFolder>) -> ElementType {
    let mut types = folders.flat_map(AdapterFolder::modules).map(|module| module.element_type);
    let first = types.next().unwrap_or(ElementType::F32);
    if types.all(|element_type| element_type == first) { first } else { ElementType::F32 }
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
