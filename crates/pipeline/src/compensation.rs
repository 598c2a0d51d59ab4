use std::path::PathBuf;
use std::time::Instant;

use kintsugi_checkpoint::{Checkpoint, Ledger, write_adapter_files};
use kintsugi_model::{Backend, BlockWeights, DecoderSpec, attach_compensation};
use kintsugi_runtime::{
    CancelToken, Error, ErrorCode, Progress, Result, StagedFolder, peak_memory_bytes, replace_file,
};
use kintsugi_weights::Adapter;
use serde::Serialize;
use serde_json::Value;

use crate::compression::{
    CalibrationData, ablation_sample, calibration_input, refuse_compressed, remove_block_files, timed,
};
use crate::eora_recipe::FactorShare;
use crate::job_identity::{identity, is_worth_resuming};
use crate::ledger_unit::LedgerUnit;
use crate::rank_ablation::RankAblation;
use crate::recovered_scales::{AsCompressed, as_compressed};
use crate::solved_factors::SolvedFactors;
use crate::{
    BlockCompressor, CalibrationRecipe, CalibrationShare, CompensationSummary, DiskPlan, EoraRecipe, LinearReport,
    MeanError, MemoryPlan, PhaseSeconds, Recipe,
};

/// A compensation of a checkpoint that is compressed already, by whomever and however.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CompensateRecipe {
    /// Folder of the checkpoint before compression.
    pub original: PathBuf,
    /// Folder or GGUF file of the compressed checkpoint: quantized, pruned, or changed in any other way.
    pub compressed: PathBuf,
    /// PEFT folder that is written.
    pub out: PathBuf,
    /// Text or statistics.
    pub calibration: CalibrationRecipe,
    /// What is solved.
    pub eora: EoraRecipe,
    /// Discard what an interrupted job left instead of going on with it.
    #[serde(skip)]
    pub fresh: bool,
    /// Bytes of memory that the job may take; `None` for what is available. Changes no bit of the output.
    #[serde(skip)]
    pub memory: Option<u64>,
}

/// What a compensation will do, before anything runs.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CompensationPlan {
    /// What was asked.
    pub recipe: CompensateRecipe,
    /// Family of the decoder.
    pub architecture: String,
    /// Each Linear, in the order of the checkpoint.
    pub linears: Vec<PlannedCompensation>,
    /// Most bytes that the factors take.
    pub bytes: u64,
    /// The memory that the job takes, and how it keeps within its budget.
    pub memory: MemoryPlan,
    /// The disk space that the job takes.
    pub disk: DiskPlan,
}

/// One Linear of a [`CompensationPlan`].
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PlannedCompensation {
    /// Name in the checkpoint.
    pub name: String,
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub columns: usize,
    /// Most that the rank can be.
    pub rank: usize,
    /// Bits of the factors; those of an A that several share with the first of them.
    pub stored_bits: u64,
}

/// What a compensation did, as `report.json` holds it.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CompensationReport {
    /// What was asked.
    pub recipe: CompensateRecipe,
    /// The whole model.
    pub summary: CompensationJobSummary,
    /// Each Linear, in the order of the checkpoint.
    pub linears: Vec<LinearReport>,
}

/// The whole model.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CompensationJobSummary {
    /// Bytes of the factors in memory.
    pub bytes: u64,
    /// Bits of the factors over the number of weights that they compensate.
    pub bits_per_weight: f64,
    /// Tokens of calibration.
    pub calibration_tokens: u64,
    /// The same by source.
    pub calibration: Vec<CalibrationShare>,
    /// Mean over the Linears.
    pub mean_error: Option<MeanError>,
    /// Ranks, proofs, errors on inputs that took no part.
    pub compensation: Option<CompensationSummary>,
    /// Wall time.
    pub seconds: f64,
    /// Where the time went.
    pub phases: PhaseSeconds,
    /// Largest resident set of the process so far; `null` where the system does not tell.
    pub peak_memory_bytes: Option<u64>,
}

impl CompensateRecipe {
    /// The recipe of a compression that takes the same statistics and solves the same factors.
    fn compression(&self) -> Recipe {
        Recipe {
            source: self.original.clone(),
            out: self.out.clone(),
            calibration: Some(self.calibration.clone()),
            eora: Some(self.eora.clone()),
            fresh: self.fresh,
            memory: self.memory,
            ..Recipe::rounding_only()
        }
    }
}

/// Both checkpoints of a compensation, opened and compared.
struct Pair {
    original: Checkpoint,
    compressed: Checkpoint,
    spec: DecoderSpec,
    compressed_spec: DecoderSpec,
    /// Compensation that lies in the compressed folder: part of what is deployed.
    there: Option<Adapter>,
}

impl Pair {
    fn open(recipe: &CompensateRecipe) -> Result<Self> {
        let original = Checkpoint::open(&recipe.original)?;
        refuse_compressed(&original)?;
        let compressed = Checkpoint::open(&recipe.compressed)?;
        let (spec, compressed_spec) = (DecoderSpec::of(&original)?, DecoderSpec::of(&compressed)?);
        let shape = |spec: &DecoderSpec| {
            let linears: Vec<String> =
                spec.linears.iter().map(|l| format!("{} {}×{}", l.name, l.rows, l.columns)).collect();
            let sizes = (spec.layers, spec.hidden_size, spec.vocabulary_size);
            (spec.family.architecture, sizes, linears)
        };
        if shape(&spec) != shape(&compressed_spec) {
            let of = |spec: &DecoderSpec| {
                format!("{} of {} blocks, {} wide", spec.family.architecture, spec.layers, spec.hidden_size)
            };
            let message = format!("it is a {}, the original is a {}", of(&compressed_spec), of(&spec));
            return Err(Error::new(ErrorCode::CheckpointShape, message)
                .subject(recipe.compressed.display())
                .hint("Give the checkpoint that was compressed, and what became of it"));
        }
        let there = compressed.compensation()?;
        if there.iter().flat_map(|adapter| adapter.linears.values()).any(|entry| entry.factors.bias().is_some()) {
            let message = "the compensation in eora/ has biases, and what another would repair are weights alone";
            return Err(Error::new(ErrorCode::AdapterInvalid, message)
                .subject(recipe.compressed.display())
                .hint("Move the folder eora/ away, and make one compensation of a larger rank"));
        }
        Ok(Pair { original, compressed, spec, compressed_spec, there })
    }

    /// Bytes of the largest compressed block in memory: a byte per code at least, and what one of its Linears takes
    /// once more.
    fn block_bytes(&self) -> u64 {
        let of_block = |block: usize| {
            let linears = self.compressed_spec.linears.iter().map(|linear| {
                let name = self.compressed_spec.linear_name(block, linear);
                let stored: u64 = self.compressed.parts_of(&name).map(|tensor| tensor.bytes).sum();
                stored.max((linear.rows * linear.columns) as u64)
            });
            linears.clone().sum::<u64>() + linears.max().unwrap_or(0)
        };
        (0..self.spec.layers).map(of_block).max().unwrap_or(0)
    }

    /// A block before and after compression.
    /// The original in the form of the compressed one, and whether that has asked for scales.
    fn read(&self, block: usize) -> Result<(AsCompressed, BlockWeights)> {
        let mut compressed = BlockWeights::read(&self.compressed, &self.compressed_spec, block)?;
        if let Some(adapter) = &self.there {
            attach_compensation(&self.spec, block, &mut compressed, adapter)?;
        }
        let original = BlockWeights::read(&self.original, &self.spec, block)?;
        Ok((as_compressed(&self.spec, original, &compressed)?, compressed))
    }
}

/// What `recipe` would do, from the headers of both checkpoints alone.
///
/// # Errors
/// Everything that [`compensate`] refuses before its first unit of work, except the calibration text.
pub fn plan_compensation(recipe: &CompensateRecipe) -> Result<CompensationPlan> {
    let compression = recipe.compression();
    compression.validate()?;
    let pair = Pair::open(recipe)?;
    let plan = plan(recipe, &compression, &pair, compression.most_calibration_tokens())?;
    plan.disk.check(&compression)?;
    Ok(plan)
}

fn plan(recipe: &CompensateRecipe, compression: &Recipe, pair: &Pair, tokens: usize) -> Result<CompensationPlan> {
    let spec = &pair.spec;
    let shares = recipe.eora.shares(spec);
    let linears: Vec<PlannedCompensation> = (0..spec.layers)
        .flat_map(|block| spec.linears.iter().zip(&shares).map(move |(linear, share)| (block, linear, share)))
        .map(|(block, linear, &FactorShare { rank, stored_bits, .. })| {
            let (rows, columns) = (linear.rows, linear.columns);
            PlannedCompensation { name: spec.linear_name(block, linear), rows, columns, rank, stored_bits }
        })
        .collect();
    recipe.eora.check_budget(spec)?;
    let bits: u64 = linears.iter().map(|linear| linear.stored_bits).sum();
    let bits = recipe.eora.budget_bits(spec).map_or(bits, |budget| budget.min(bits));
    let file_bytes = shares.iter().map(|share| share.file_bytes).sum::<u64>() * spec.layers as u64;
    Ok(CompensationPlan {
        recipe: recipe.clone(),
        architecture: spec.family.architecture.to_owned(),
        linears,
        bytes: bits.div_ceil(8),
        memory: MemoryPlan::beside(pair.block_bytes(), compression, &pair.original, spec, tokens)?,
        disk: DiskPlan::new(compression, &pair.original, spec, (file_bytes, file_bytes), tokens)?,
    })
}

/// Compensates a compressed checkpoint by factors that are written as a PEFT folder; no checkpoint is changed.
///
/// The activations are those of the compressed model with the compensation of the blocks before. Compensation that the
/// compressed folder has is part of it: what is written is to be added. Where both checkpoints differ in their norms,
/// as after AWQ, the original is first brought to the scales of the compressed one. A job that is cancelled or killed
/// goes on behind the last block that was finished, to the same bytes.
///
/// # Errors
/// As [`compress`](crate::compress); `ERR_CHECKPOINT_SHAPE` when the checkpoints are not of one model,
/// `ERR_ADAPTER_INVALID` when there is nothing to compensate.
pub fn compensate<B: Backend>(
    recipe: &CompensateRecipe,
    backend: &B,
    cancel: &CancelToken,
    progress: &Progress,
) -> Result<CompensationReport> {
    let started = Instant::now();
    let compression = recipe.compression();
    compression.validate()?;
    let pair = Pair::open(recipe)?;
    plan(recipe, &compression, &pair, compression.least_calibration_tokens())?;
    progress.begin("prepare", pair.spec.layers as u64);
    let calibration = CalibrationData::read(&compression, &pair.original, &pair.spec)?;
    let plan = plan(recipe, &compression, &pair, calibration.tokens())?;
    let identity = identity(recipe, &[&pair.original, &pair.compressed], &calibration, &backend.identity())?;
    plan.disk.check(&compression)?;
    let (staged, ledger, units) = begin(recipe, &pair.spec, &identity)?;
    let mut job = Job { recipe, compression: &compression, pair: &pair, staged, ledger, units, started };
    match job.run(backend, calibration, &plan, cancel, progress) {
        Ok(report) => {
            // Until the ledger is gone a later run finds everything that it speaks of.
            job.ledger.remove()?;
            remove_block_files(job.staged.path())?;
            job.staged.commit()?;
            Ok(report)
        }
        Err(error) => {
            if !is_worth_resuming(&error) || job.units.is_empty() {
                job.staged.discard();
            }
            Err(error)
        }
    }
}

/// Goes on with what an interrupted job left, or starts anew.
fn begin(
    recipe: &CompensateRecipe,
    spec: &DecoderSpec,
    identity: &Value,
) -> Result<(StagedFolder, Ledger, Vec<LedgerUnit>)> {
    match Ledger::reopen::<LedgerUnit>(&recipe.out, identity) {
        Err(error) if !(recipe.fresh && error.code == ErrorCode::ResumeMismatch) => return Err(error),
        Ok(Some((ledger, units))) if !recipe.fresh => {
            LedgerUnit::check_order(&units, 0, spec)?;
            if let Some(staged) = StagedFolder::reopen(&recipe.out)? {
                return Ok((staged, ledger, units));
            }
        }
        _ => {}
    }
    let staged = StagedFolder::create(&recipe.out)?;
    let ledger = Ledger::create(staged.path(), identity)?;
    Ok((staged, ledger, Vec::new()))
}

/// A compensation under way.
struct Job<'a> {
    recipe: &'a CompensateRecipe,
    compression: &'a Recipe,
    pair: &'a Pair,
    staged: StagedFolder,
    ledger: Ledger,
    /// Finished blocks, and the ablations behind them.
    units: Vec<LedgerUnit>,
    started: Instant,
}

impl Job<'_> {
    /// Everything up to the last rename.
    fn run<B: Backend>(
        &mut self,
        backend: &B,
        calibration: CalibrationData,
        plan: &CompensationPlan,
        cancel: &CancelToken,
        progress: &Progress,
    ) -> Result<CompensationReport> {
        let before = self.units.last().map_or((0.0, PhaseSeconds::default()), |unit| (unit.seconds, unit.phases));
        let (spec, folder) = (&self.pair.spec, self.staged.path().to_path_buf());
        let mut phases = PhaseSeconds::default();
        let sample = ablation_sample(self.compression, &calibration);
        let (tokens, shares) = (calibration.seen(), calibration.shares.clone());
        // Behind the blocks there may be a unit of ablations.
        let finished = self.units.len().min(spec.layers);
        let on_disk = plan.memory.activations_on_disk.then_some(folder.as_path());
        let models = (&self.pair.compressed, &self.pair.original);
        let finished_blocks = (finished, self.units.last());
        let input = calibration_input(self.compression, models, spec, calibration, finished_blocks, on_disk, &folder)?;
        let mut compressor = BlockCompressor::new(self.compression, spec, backend, input, &plan.memory)?;
        progress.resume(finished as u64);
        for block in finished..spec.layers {
            cancel.check()?;
            progress.at("compensate", spec.block_name(block));
            let ((original, compressed), seconds) = timed(|| self.pair.read(block))?;
            phases.read += seconds;
            if original.scaled && self.compression.uses_statistics() {
                let message =
                    "the norms or rows of the compressed checkpoint have scales that the statistics do not know";
                return Err(Error::new(ErrorCode::OptionInvalid, message)
                    .subject("calibration.file")
                    .hint("Give the text that the statistics were taken from"));
            }
            let found = compressor.compensate(block, original.weights, &compressed, cancel)?;
            let writing = Instant::now();
            let factors = SolvedFactors::save(&folder, spec, block, &found.factors)?;
            let activations = compressor.stream().map(|stream| stream.save(&folder)).transpose()?;
            let dense_activations = compressor.dense_stream().map(|stream| stream.save(&folder)).transpose()?;
            phases.write += writing.elapsed().as_secs_f64();
            let unit = LedgerUnit {
                part: None,
                profiles: found.profiles_to_keep(self.compression),
                linears: found.linears,
                activations,
                dense_activations,
                factors,
                ablation: None,
                seconds: before.0 + self.started.elapsed().as_secs_f64(),
                phases: before.1.plus(phases).plus(compressor.phases()),
            };
            self.ledger.append(&unit)?;
            self.units.push(unit);
            self.staged.keep();
            progress.advance(1);
        }

        if let Some(sample) = sample.filter(|_| self.units.len() <= spec.layers) {
            let measuring = Instant::now();
            let (deployed, there) = (&self.pair.compressed, self.pair.there.as_ref());
            let (eora, folder, units) = (&self.recipe.eora, &folder, &self.units);
            let ablation = RankAblation { backend, spec, eora, deployed, there, folder, units, cancel, progress };
            let costs = ablation.run(&sample)?;
            phases.calibrate += measuring.elapsed().as_secs_f64();
            let unit = LedgerUnit {
                ablation: Some(costs),
                seconds: before.0 + self.started.elapsed().as_secs_f64(),
                phases: before.1.plus(phases).plus(compressor.phases()),
                ..LedgerUnit::default()
            };
            self.ledger.append(&unit)?;
            self.units.push(unit);
        }
        progress.at("write", "");
        let finishing = Instant::now();
        let solved = SolvedFactors::divide(self.compression, spec, &self.units)?;
        let adapter = solved.read(&folder, &self.units)?;
        if adapter.linears.is_empty() {
            return Err(Error::new(ErrorCode::AdapterInvalid, "there is nothing to compensate")
                .subject(self.recipe.compressed.display())
                .hint("Its Linears are those of the original; give the compressed checkpoint"));
        }
        let base = self.recipe.compressed.file_name().unwrap_or_default().to_string_lossy();
        write_adapter_files(&folder, &adapter, &base)?;
        phases.write += finishing.elapsed().as_secs_f64();
        let SolvedFactors { linears, allocation, bits } = solved;
        let weights: usize = linears.iter().map(|linear| linear.rows * linear.columns).sum();
        let report = CompensationReport {
            recipe: self.recipe.clone(),
            summary: CompensationJobSummary {
                bytes: bits.div_ceil(8),
                bits_per_weight: bits as f64 / weights.max(1) as f64,
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
        replace_file(&folder.join("report.json"), text.as_bytes())?;
        cancel.check()?;
        Ok(report)
    }
}
