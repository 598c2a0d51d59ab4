use std::collections::HashSet;
use std::path::Path;
use std::time::Instant;

use kintsugi_checkpoint::gguf::into_gguf_folder;
use kintsugi_checkpoint::{Checkpoint, CheckpointWriter, Ledger, LinearFormat, QuantizationConfig, Scheme, UnitRecord};
use kintsugi_model::{Backend, BlockWeights, DecoderSpec};
use kintsugi_runtime::{CancelToken, Error, ErrorCode, Progress, Result, peak_memory_bytes, replace_file};
use kintsugi_weights::{GroupAxis, WeightMatrix};
use serde_json::Value;

use crate::bit_allocation::{BitAllocation, Search};
use crate::job_identity::{identity, is_worth_resuming};
use crate::ledger_unit::LedgerUnit;
use crate::output_format::OutputFormat;
use crate::plan::stored_type;
use crate::rank_ablation::{AblationGroups, RankAblation};
use crate::solved_factors::SolvedFactors;
use crate::{
    BlockCompressor, CalibrationInput, CalibrationShare, CalibrationStream, CalibrationTokens, CompensationSummary,
    CompressedBlock, EoraInputs, EoraRecipe, MeanError, PhaseSeconds, Plan, Recipe, Report, SavedStatistics,
    StatisticsWriter, Summary,
};

/// What `recipe` would do, from the headers of the checkpoint alone.
///
/// # Errors
/// Everything that [`compress`] refuses before its first unit of work, except the calibration text.
pub fn plan(recipe: &Recipe) -> Result<Plan> {
    recipe.validate()?;
    let checkpoint = Checkpoint::open(&recipe.source)?;
    let spec = DecoderSpec::of(&checkpoint)?;
    let plan = Plan::new(recipe, &checkpoint, &spec, recipe.most_calibration_tokens())?;
    plan.disk.check(recipe)?;
    Ok(plan)
}

/// What the statistics of a job come from; nothing where there are none.
pub(crate) struct CalibrationData {
    /// Tokens that the model reads.
    pub(crate) tokens: Option<CalibrationTokens>,
    /// Files of statistics.
    pub(crate) saved: Vec<SavedStatistics>,
    /// What each source gives.
    pub(crate) shares: Vec<CalibrationShare>,
    /// What a token counts in the sums, on average.
    pub(crate) token_weight: f64,
    /// Whether some tokens count more than others.
    pub(crate) is_mixture: bool,
}

impl CalibrationData {
    /// Tokens that the model reads.
    pub(crate) fn tokens(&self) -> usize {
        self.tokens.as_ref().map_or(0, |tokens| tokens.tokens().len())
    }

    /// Tokens that statistics are of.
    pub(crate) fn seen(&self) -> u64 {
        self.shares.iter().map(|share| share.tokens).sum()
    }

    pub(crate) fn read(recipe: &Recipe, checkpoint: &Checkpoint, spec: &DecoderSpec) -> Result<Self> {
        let Some(calibration) = &recipe.calibration else {
            let (saved, shares) = (Vec::new(), Vec::new());
            return Ok(CalibrationData { tokens: None, saved, shares, token_weight: 1.0, is_mixture: false });
        };
        let open = |source| SavedStatistics::open(source, recipe.stream_name(), checkpoint, spec);
        let saved: Vec<SavedStatistics> = calibration.statistics().map(open).collect::<Result<_>>()?;
        // What a token counts is known of all experts together, and the mean of one asks for its own tokens.
        let affine = recipe.eora.as_ref().is_some_and(|eora| eora.affine) && spec.experts.is_some();
        if let Some(mixture) = saved.iter().find(|saved| affine && saved.is_mixture()) {
            let message = "the statistics are of a mixture, and do not say what the tokens of an expert count in it";
            return Err(Error::new(ErrorCode::OptionInvalid, message)
                .subject("eora.affine")
                .hint(format!("Give the texts in place of {}, or leave eora.affine out", mixture.path().display())));
        }
        let tokens = recipe.passes().map(|texts| CalibrationTokens::read(texts, checkpoint, spec)).transpose()?;
        // Both kinds are in the order of the sources.
        let mut of_saved = saved.iter().map(|saved| Ok((saved.all_tokens()?, saved.token_weight())));
        let mut of_texts = tokens.as_ref().map_or(&[][..], |tokens| tokens.spans().0).iter();
        let counts = calibration.sources.iter().map(|source| match source.is_statistics() {
            true => of_saved.next().unwrap_or(Ok((0, 1.0))),
            false => Ok((of_texts.next().map_or(0, |span| span.tokens as u64), 1.0)),
        });
        let counts: Vec<(u64, f64)> = counts.collect::<Result<_>>()?;
        let shares = CalibrationShare::of(&calibration.sources, &counts);
        let weights = calibration.sources.iter().map(|source| source.weight);
        let total: f64 = counts.iter().map(|&(tokens, _)| tokens as f64).sum();
        let weighted: f64 = counts.iter().zip(weights).map(|(&(tokens, each), w)| w * each * tokens as f64).sum();
        let token_weight = if total > 0.0 { weighted / total } else { 1.0 };
        let mut each = counts.iter().zip(&calibration.sources).map(|(&(_, each), source)| source.weight * each);
        let first = each.next();
        let is_mixture = each.any(|weight| Some(weight) != first) || saved.iter().any(SavedStatistics::is_mixture);
        Ok(CalibrationData { tokens, saved, shares, token_weight, is_mixture })
    }
}

/// Compresses a checkpoint into a new folder.
///
/// Everything is written under `OUT.partial`, which becomes `OUT` by one rename. A job that is cancelled, killed or
/// stopped by a full disk leaves that folder with its ledger, and the same recipe goes on behind the last block that
/// was finished; the bytes are those of an undisturbed run, times in the report aside.
///
/// # Errors
/// A refused recipe, checkpoint or text, and what solvers and reading report: nothing stays behind then.
/// `ERR_RESUME_MISMATCH` when `OUT.partial` belongs to another job, `ERR_OUTPUT_BUSY` while it runs,
/// `ERR_OUTPUT_UNWRITABLE`, `ERR_CANCELLED`.
pub fn compress<B: Backend>(recipe: &Recipe, backend: &B, cancel: &CancelToken, progress: &Progress) -> Result<Report> {
    let started = Instant::now();
    recipe.validate()?;
    let checkpoint = Checkpoint::open(&recipe.source)?;
    let spec = DecoderSpec::of(&checkpoint)?;
    // What is refused with one sequence is refused before the file is read; how many it holds is known afterwards.
    Plan::new(recipe, &checkpoint, &spec, recipe.least_calibration_tokens())?;
    progress.begin("prepare", spec.layers as u64);
    let calibration = CalibrationData::read(recipe, &checkpoint, &spec)?;
    let plan = Plan::new(recipe, &checkpoint, &spec, calibration.tokens())?;
    let identity = identity(recipe, &[&checkpoint], &calibration, &backend.identity())?;
    plan.disk.check(recipe)?;
    let (writer, ledger, units) =
        begin(recipe, (&checkpoint, &spec), OutputFormat::of_name(&plan.format)?.layout(), &identity)?;
    let mut job = Compression { recipe, checkpoint: &checkpoint, spec: &spec, writer, ledger, units, started };
    match job.run(backend, calibration, &plan, cancel, progress) {
        Ok(report) => {
            job.ledger.remove()?;
            job.writer.commit()?;
            Ok(report)
        }
        Err(error) => {
            if !is_worth_resuming(&error) || (job.units.len() < 2 && !BitAllocation::is_found(job.writer.folder())) {
                job.writer.discard();
                recipe.save_statistics.as_deref().inspect(|path| StatisticsWriter::discard(path));
            }
            Err(error)
        }
    }
}

/// Refuses a checkpoint that is compressed already, as the original of another.
///
/// # Errors
/// `ERR_QUANTIZATION_UNSUPPORTED`.
pub(crate) fn refuse_compressed(checkpoint: &Checkpoint) -> Result<()> {
    let stated = checkpoint.quantization().map(|quantization| format!("{} bits", quantization.bits));
    match stated.or_else(|| checkpoint.block_type().map(|main| main.name.to_owned())) {
        None => Ok(()),
        Some(form) => Err(Error::new(
            ErrorCode::QuantizationUnsupported,
            format!("the checkpoint is compressed already, to {form}"),
        )
        .subject(checkpoint.path().display())
        .hint("Give the original checkpoint")),
    }
}

/// Goes on with what an interrupted job left, or starts anew.
fn begin(
    recipe: &Recipe,
    (checkpoint, spec): (&Checkpoint, &DecoderSpec),
    format: &'static dyn LinearFormat,
    identity: &Value,
) -> Result<(CheckpointWriter, Ledger, Vec<LedgerUnit>)> {
    match Ledger::reopen::<LedgerUnit>(&recipe.out, identity) {
        Err(error) if !(recipe.fresh && error.code == ErrorCode::ResumeMismatch) => return Err(error),
        Ok(Some((ledger, units))) if !recipe.fresh => {
            LedgerUnit::check_order(&units, 1, spec)?;
            let parts: Vec<UnitRecord> = units.iter().filter_map(|unit| unit.part.clone()).collect();
            if let Some(writer) = CheckpointWriter::resume(&recipe.out, checkpoint, &parts)? {
                return Ok((writer.format(format), ledger, units));
            }
        }
        _ => {}
    }
    let writer = CheckpointWriter::create(&recipe.out, checkpoint)?.format(format);
    let ledger = Ledger::create(writer.folder(), identity)?;
    Ok((writer, ledger, Vec::new()))
}

/// A compression under way.
struct Compression<'a> {
    recipe: &'a Recipe,
    checkpoint: &'a Checkpoint,
    spec: &'a DecoderSpec,
    writer: CheckpointWriter,
    ledger: Ledger,
    /// Finished: the tensors outside of the blocks, then the blocks, and the ablations behind them.
    units: Vec<LedgerUnit>,
    started: Instant,
}

impl Compression<'_> {
    /// Everything up to the last rename.
    fn run<B: Backend>(
        &mut self,
        backend: &B,
        calibration: CalibrationData,
        plan: &Plan,
        cancel: &CancelToken,
        progress: &Progress,
    ) -> Result<Report> {
        let before = self.units.last().map_or((0.0, PhaseSeconds::default()), |unit| (unit.seconds, unit.phases));
        let (recipe, spec) = (self.recipe, self.spec);
        let format = OutputFormat::of_name(&plan.format)?;
        let mut phases = PhaseSeconds::default();
        if self.units.is_empty() {
            phases.write += timed(|| copy_outside(&mut self.writer, self.checkpoint, spec, cancel))?.1;
            let part = self.writer.end_unit()?;
            self.record(LedgerUnit { part, phases: before.1.plus(phases), ..LedgerUnit::default() }, before.0)?;
        }
        // Behind the blocks there may be a unit of ablations.
        let finished_blocks = (self.units.len() - 1).min(spec.layers);
        let folder = self.writer.folder().to_path_buf();
        let allocated = match (&calibration.tokens, recipe.bit_budget) {
            (Some(text), Some(_)) if finished_blocks < spec.layers => {
                let checkpoint = self.checkpoint;
                let (format, stored) = (format.layout(), stored_type(checkpoint, spec));
                let search = Search { recipe, checkpoint, spec, backend, text, format, stored, cancel };
                let (found, seconds) = timed(|| BitAllocation::resume_or_find(&search, &folder, progress))?;
                phases.calibrate += seconds;
                self.writer.keep();
                progress.begin("prepare", spec.layers as u64);
                Some(found.applied(recipe))
            }
            _ => None,
        };
        let recipe = allocated.as_ref().unwrap_or(recipe);
        let on_disk = plan.memory.activations_on_disk.then_some(folder.as_path());
        let sample = ablation_sample(recipe, &calibration);
        let (tokens, shares) = (calibration.seen(), calibration.shares.clone());
        let counts = (calibration.token_weight, calibration.is_mixture);
        let done = finished_blocks == spec.layers;
        let saver = match &recipe.save_statistics {
            // The last run may have ended before the file had its name.
            Some(path) if !done || StatisticsWriter::is_unfinished(path) || !path.is_file() => {
                Some(StatisticsWriter::create(path, self.recipe, self.checkpoint, spec, counts, finished_blocks)?)
            }
            _ => None,
        };
        let last = Some(&self.units[finished_blocks]);
        let models = (self.checkpoint, self.checkpoint);
        let input =
            calibration_input(self.recipe, models, spec, calibration, (finished_blocks, last), on_disk, &folder)?;
        let mut compressor = BlockCompressor::new(recipe, spec, backend, input, &plan.memory)?.saving(saver);
        progress.resume(finished_blocks as u64);
        for block in finished_blocks..spec.layers {
            cancel.check()?;
            progress.at("compress", spec.block_name(block));
            let (weights, seconds) = timed(|| BlockWeights::read(self.checkpoint, spec, block))?;
            phases.read += seconds;
            let compressed = compressor.compress(block, weights, cancel)?;
            let writing = Instant::now();
            write_block(&mut self.writer, self.checkpoint, spec, block, &compressed)?;
            let part = self.writer.end_unit()?;
            let factors = SolvedFactors::save(self.writer.folder(), spec, block, &compressed.factors)?;
            let save = |stream: &CalibrationStream<B>| stream.save(self.writer.folder());
            let activations = compressor.stream().map(save).transpose()?;
            let dense_activations = compressor.dense_stream().map(save).transpose()?;
            phases.write += writing.elapsed().as_secs_f64();
            let unit = LedgerUnit {
                part,
                profiles: compressed.profiles_to_keep(recipe),
                linears: compressed.linears,
                activations,
                dense_activations,
                factors,
                phases: before.1.plus(phases).plus(compressor.phases()),
                ..LedgerUnit::default()
            };
            self.record(unit, before.0)?;
            self.writer.keep();
            progress.advance(1);
        }

        compressor.finish_saving()?;
        let config = self.quantization_config(format.layout());
        let sample = sample.filter(|_| self.units.len() <= spec.layers + 1);
        if let (Some(sample), Some(eora)) = (sample, &recipe.eora) {
            let measuring = Instant::now();
            let (deployed, units) = (self.writer.staged(&config)?, &self.units);
            let (deployed, folder) = (&deployed, &folder);
            let ablation = RankAblation { backend, spec, eora, deployed, there: None, folder, units, cancel, progress };
            let costs = ablation.run(&sample)?;
            phases.calibrate += measuring.elapsed().as_secs_f64();
            let phases = before.1.plus(phases).plus(compressor.phases());
            self.record(LedgerUnit { ablation: Some(costs), phases, ..LedgerUnit::default() }, before.0)?;
        }
        progress.at("write", "");
        let finishing = Instant::now();
        let solved = SolvedFactors::divide(recipe, spec, &self.units)?;
        if !self.writer.has_compensation() {
            let factors = solved.read(self.writer.folder(), &self.units)?;
            self.writer.write_compensation(&factors)?;
        }
        remove_block_files(self.writer.folder())?;
        let mut bytes = self.writer.seal(&config)?;
        let mut notices = Vec::new();
        if let Some(plan) = format.gguf_plan(recipe) {
            notices = into_gguf_folder(&folder, &plan, cancel, progress)?.notices;
            bytes = self.writer.bytes()?;
        }
        let bytes = bytes - self.ledger.bytes();
        phases.write += finishing.elapsed().as_secs_f64();
        let SolvedFactors { linears, allocation, .. } = solved;
        let stored_bits: u64 = linears.iter().map(|linear| linear.stored_bits).sum();
        let report = Report {
            recipe: self.recipe.clone(),
            summary: Summary {
                format: plan.format.clone(),
                notices,
                bits_per_weight: stored_bits as f64 / plan.quantized_weights as f64,
                bytes,
                source_bytes: plan.source_bytes,
                quantized_weights: plan.quantized_weights,
                calibration_tokens: tokens,
                calibration: shares,
                mean_error: MeanError::over(&linears),
                compensation: CompensationSummary::over(&linears, allocation),
                seconds: before.0 + self.started.elapsed().as_secs_f64(),
                phases: before.1.plus(phases).plus(compressor.phases()),
                peak_memory_bytes: peak_memory_bytes(),
            },
            linears,
        };
        let text = serde_json::to_string_pretty(&report)
            .map_err(|error| Error::new(ErrorCode::Internal, format!("the report cannot be written: {error}")))?;
        replace_file(&self.writer.folder().join("report.json"), text.as_bytes())?;
        if let OutputFormat::Folder(_) = format {
            cancel.check()?;
        }
        Ok(report)
    }

    /// What was written, for `config.json`.
    fn quantization_config(&self, format: &'static dyn LinearFormat) -> QuantizationConfig {
        let ignore: Vec<String> =
            std::iter::once(self.spec.family.head.to_owned()).chain(self.spec.routers()).collect();
        self.writer.quantization(ignore.clone()).unwrap_or_else(|| {
            // A model without a Linear in its blocks.
            let Recipe { bits, symmetric, .. } = *self.recipe;
            let scheme = Scheme {
                bits,
                group_size: self.recipe.group_size(),
                group_axis: GroupAxis::Input,
                symmetric,
                group_index: false,
            };
            QuantizationConfig::uniform(format, scheme, ignore)
        })
    }

    fn record(&mut self, unit: LedgerUnit, seconds_before: f64) -> Result<()> {
        let unit = LedgerUnit { seconds: seconds_before + self.started.elapsed().as_secs_f64(), ..unit };
        self.ledger.append(&unit)?;
        self.units.push(unit);
        Ok(())
    }
}

/// The tokens that ablations run over, and whether they are held out; `None` where no division asks for them.
pub(crate) fn ablation_sample(recipe: &Recipe, calibration: &CalibrationData) -> Option<(CalibrationTokens, bool)> {
    let ablates = recipe.eora.as_ref().is_some_and(EoraRecipe::ablates);
    calibration.tokens.as_ref().filter(|_| ablates).map(|tokens| tokens.sample(AblationGroups::TOKENS))
}

/// Where the statistics of the next block come from: after so many finished blocks, the last of which has left the
/// input of the next in `folder`, as `unit` says. `models` are the deployed and the original one. Activations are kept in
/// files of `on_disk`, or in memory.
///
/// # Errors
/// What reading the embedding or the activations reports; `ERR_RESUME_MISMATCH` where the last block has left none.
pub(crate) fn calibration_input<B: Backend>(
    recipe: &Recipe,
    models: (&Checkpoint, &Checkpoint),
    spec: &DecoderSpec,
    calibration: CalibrationData,
    (finished_blocks, unit): (usize, Option<&LedgerUnit>),
    on_disk: Option<&Path>,
    folder: &Path,
) -> Result<CalibrationInput<B>> {
    let inputs = recipe.eora.as_ref().map_or(EoraInputs::Deployed, |eora| eora.inputs);
    let goes_on = calibration.tokens.is_some() && finished_blocks > 0 && finished_blocks < spec.layers;
    let left =
        |unit: &LedgerUnit| unit.activations.is_some() && (unit.dense_activations.is_some() || !inputs.is_mixed());
    if goes_on && !unit.is_some_and(left) {
        let message = "the last finished block has left no input for the next one";
        return Err(Error::new(ErrorCode::ResumeMismatch, message)
            .subject(folder.display())
            .hint("Discard what the interrupted job left with fresh (--fresh)"));
    }
    let (deployed, original) = models;
    let first = if inputs == EoraInputs::Dense { original } else { deployed };
    let saved = unit.and_then(|unit| unit.activations.as_deref());
    let stream = match (&calibration.tokens, saved) {
        (Some(text), _) if finished_blocks == 0 => Some(CalibrationStream::new(first, spec, text, on_disk)?),
        (Some(text), Some(saved)) if finished_blocks < spec.layers => {
            Some(CalibrationStream::resume(spec, text, on_disk, folder, saved)?)
        }
        _ => None,
    };
    let saved = unit.and_then(|unit| unit.dense_activations.as_deref());
    let dense = match (calibration.tokens.as_ref().filter(|_| inputs.is_mixed()), saved) {
        (Some(text), _) if finished_blocks == 0 => {
            Some(CalibrationStream::of_dense_model(original, spec, text, on_disk)?)
        }
        (Some(text), Some(saved)) if finished_blocks < spec.layers => {
            Some(CalibrationStream::resume_dense_model(spec, text, on_disk, folder, saved)?)
        }
        _ => None,
    };
    Ok(CalibrationInput { stream, dense, saved: calibration.saved })
}

/// Removes from the folder of a job what was for a later run only, and what an interrupted one was writing.
///
/// # Errors
/// `ERR_OUTPUT_UNWRITABLE`.
pub(crate) fn remove_block_files(folder: &Path) -> Result<()> {
    let remove = || {
        for entry in std::fs::read_dir(folder)? {
            let (name, path) = entry.map(|entry| (entry.file_name(), entry.path()))?;
            let name = name.to_string_lossy();
            if name.starts_with("activations-") || name.starts_with(SolvedFactors::PREFIX) || name.ends_with(".partial")
            {
                if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) }?;
            }
        }
        Ok(())
    };
    remove().map_err(|error| Error::unwritable(folder, &error))
}

/// Copies every tensor that does not belong to a block.
fn copy_outside(
    writer: &mut CheckpointWriter,
    checkpoint: &Checkpoint,
    spec: &DecoderSpec,
    cancel: &CancelToken,
) -> Result<()> {
    let prefix = format!("{}.", spec.name(spec.family.blocks));
    for tensor in checkpoint.tensors().filter(|tensor| !tensor.name.starts_with(&prefix)) {
        cancel.check()?;
        writer.copy(&tensor.name)?;
    }
    Ok(())
}

/// Writes the Linears of a block in their compressed form and what has changed beside them, and copies the rest.
fn write_block(
    writer: &mut CheckpointWriter,
    checkpoint: &Checkpoint,
    spec: &DecoderSpec,
    block: usize,
    compressed: &CompressedBlock,
) -> Result<()> {
    let mut replaced = HashSet::new();
    for (tensor, values) in &compressed.rewritten {
        let name = format!("{}.{tensor}", spec.block_name(block));
        writer.rewrite(&name, values)?;
        replaced.insert(name);
    }
    for (linear, weight) in spec.linears.iter().zip(&compressed.weights.linears) {
        let name = spec.linear_name(block, linear);
        if let WeightMatrix::Quantized(matrix) = &weight.matrix {
            writer.write_linear(&name, matrix)?;
        }
        replaced.extend(checkpoint.parts_of(&name).map(|tensor| tensor.name.clone()));
    }
    let prefix = format!("{}.", spec.block_name(block));
    for tensor in checkpoint.tensors().filter(|tensor| tensor.name.starts_with(&prefix)) {
        if !replaced.contains(&tensor.name) {
            writer.copy(&tensor.name)?;
        }
    }
    Ok(())
}

/// What `work` gives, and the seconds that it took.
pub(crate) fn timed<T>(work: impl FnOnce() -> Result<T>) -> Result<(T, f64)> {
    let started = Instant::now();
    Ok((work()?, started.elapsed().as_secs_f64()))
}
