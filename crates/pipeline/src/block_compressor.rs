use std::collections::BTreeMap;
use std::time::Instant;

use kintsugi_calibration::{Calibration, Drift};
use kintsugi_compensate::{
    Certificate, DenseError, HoldOut, HoldOutError, MixedInputs, OutputSquares, RankProfile, ResidualError, compensate,
    compensate_mixed, group_scales, output_energies, residual_error,
};
use kintsugi_compress::{BlockMethod, LinearMethod, linear_method};
use kintsugi_model::{Backend, Block, BlockWeights, DecoderSpec, TapPoint};
use kintsugi_runtime::{CancelToken, Error, ErrorCode, Result, ThreadPool};
use kintsugi_weights::{
    ElementType, GroupAxis, GroupSize, LinearWeight, LowRank, RowSource, StackedRows, WeightMatrix,
};

use crate::eora_unit::EoraUnit;
use crate::memory_plan::{split, statistics_bytes};
use crate::scale_folding::{FoldedBlock, ScaleFolding};
use crate::{
    CalibrationStream, CapturedDrift, CapturedInputs, EoraInputs, LinearReport, MemoryPlan, PhaseSeconds, RankWeights,
    Recipe, SavedStatistics, StatisticsWriter,
};

/// Compresses one decoder block after another and carries the calibration activations along.
pub struct BlockCompressor<'a, B: Backend> {
    recipe: &'a Recipe,
    spec: &'a DecoderSpec,
    backend: &'a B,
    block_method: Option<&'static dyn BlockMethod>,
    method: &'static dyn LinearMethod,
    input: CalibrationInput<B>,
    /// Where the statistics go too.
    saved: Option<StatisticsWriter>,
    /// Bytes that the statistics of one pass may take.
    statistics_room: u64,
    /// What one compensation each is solved for.
    units: Vec<EoraUnit>,
    /// Directions of the factors that run in the blocks behind.
    deployed_rank: usize,
    phases: PhaseSeconds,
}

/// Where the statistics of the inputs come from; nowhere when both are empty, and from both together.
pub struct CalibrationInput<B: Backend> {
    /// Activations that are carried along: those of the deployed model, or of the dense one if the compensation is solved
    /// for its inputs.
    pub stream: Option<CalibrationStream<B>>,
    /// Activations of the dense model beside them, if the compensation is solved for both.
    pub dense: Option<CalibrationStream<B>>,
    /// Statistics of earlier jobs.
    pub saved: Vec<SavedStatistics>,
}

/// A block in its deployed form.
#[derive(Clone, Debug)]
pub struct CompressedBlock {
    /// Quantized, with the factors of the compensation.
    pub weights: BlockWeights,
    /// What was done to each Linear, in the order of [`DecoderSpec::linears`].
    pub linears: Vec<LinearReport>,
    /// Norms and biases that have changed: names inside the block, and values.
    pub rewritten: Vec<(String, Vec<f32>)>,
    /// The factors that were solved for each Linear, of the largest rank.
    pub factors: Vec<Option<LowRank>>,
    /// What each rank of them leaves; of Linears that share an A together, with the first of them.
    pub profiles: Vec<Option<RankProfile>>,
}

impl CompressedBlock {
    /// The profiles that are needed until the end of a job: those of one that divides a budget of ranks.
    pub(crate) fn profiles_to_keep(&self, recipe: &Recipe) -> Vec<Option<RankProfile>> {
        let divides = recipe.eora.as_ref().is_some_and(|eora| eora.allocation.is_some());
        if divides { self.profiles.clone() } else { Vec::new() }
    }
}

/// What was found for one Linear.
struct CompressedLinear {
    weight: LinearWeight,
    report: LinearReport,
    factors: Option<LowRank>,
    profile: Option<RankProfile>,
}

/// What is known about the inputs of a Linear.
#[derive(Clone, Copy)]
struct KnownInputs<'a> {
    statistics: Option<&'a Calibration>,
    held_out: Option<&'a HoldOut>,
    /// What is known of the outputs, by place.
    outputs: &'a BTreeMap<usize, OutputSquares>,
    /// How far they are from those of the dense model.
    drift: Option<&'a Drift>,
    held_out_drift: Option<&'a HoldOut>,
}

/// A compensation that may be none.
#[derive(Default)]
struct Solved {
    factors: Option<LowRank>,
    error: Option<ResidualError>,
    hold_out: Option<HoldOutError>,
    dense_error: Option<DenseError>,
    certificate: Option<Certificate>,
    profile: Option<RankProfile>,
}

impl<'a, B: Backend> BlockCompressor<'a, B> {
    /// A compressor of the blocks from that on which `input` stands at.
    ///
    /// # Errors
    /// `ERR_OPTION_INVALID` for an unknown method.
    pub fn new(
        recipe: &'a Recipe,
        spec: &'a DecoderSpec,
        backend: &'a B,
        input: CalibrationInput<B>,
        memory: &MemoryPlan,
    ) -> Result<Self> {
        let method = recipe.method()?;
        let block_method = recipe.block_method();
        let (statistics_room, phases) = (memory.statistics_room, PhaseSeconds::default());
        let deployed_rank = recipe.eora.as_ref().map_or(0, |eora| eora.uniform_rank(spec));
        let units = EoraUnit::of_block(spec, recipe.eora.as_ref().is_some_and(|eora| eora.grouped));
        Ok(BlockCompressor {
            recipe,
            spec,
            backend,
            block_method,
            method,
            input,
            saved: None,
            statistics_room,
            units,
            deployed_rank,
            phases,
        })
    }

    /// Saves the statistics with `writer`, too.
    #[must_use]
    pub fn saving(self, writer: Option<StatisticsWriter>) -> Self {
        BlockCompressor { saved: writer, ..self }
    }

    /// The calibration activations, at the input of the next block.
    pub fn stream(&self) -> Option<&CalibrationStream<B>> {
        self.input.stream.as_ref()
    }

    /// Those of the dense model beside them, if there are any.
    pub fn dense_stream(&self) -> Option<&CalibrationStream<B>> {
        self.input.dense.as_ref()
    }

    /// Which inputs the compensation is solved for.
    fn inputs(&self) -> EoraInputs {
        self.recipe.eora.as_ref().map_or(EoraInputs::Deployed, |eora| eora.inputs)
    }

    /// Whether errors of Linears that share an A count relative to the outputs of each.
    fn counts_relative(&self) -> bool {
        let allocation = self.recipe.eora.as_ref().and_then(|eora| eora.allocation);
        allocation.is_none_or(|allocation| allocation.weights != RankWeights::Equal)
    }

    /// Ends the file of saved statistics, if there is one: call it after the last block.
    ///
    /// # Errors
    /// `ERR_OUTPUT_UNWRITABLE`.
    pub fn finish_saving(&mut self) -> Result<()> {
        self.saved.take().map_or(Ok(()), StatisticsWriter::finish)
    }

    /// Seconds spent so far.
    pub fn phases(&self) -> PhaseSeconds {
        self.phases
    }

    /// Compresses block `index`, whose weights are `original`. Blocks must come in order.
    ///
    /// # Errors
    /// What the solvers report, with the Linear as subject; `ERR_CANCELLED`.
    pub fn compress(&mut self, index: usize, original: BlockWeights, cancel: &CancelToken) -> Result<CompressedBlock> {
        self.run(index, original, None, cancel)
    }

    /// Compensates block `index` of a checkpoint that is compressed already: `original` are its weights before, in the
    /// form that norms and biases of `compressed` ask for. Blocks must come in order.
    ///
    /// # Errors
    /// As [`BlockCompressor::compress`].
    pub fn compensate(
        &mut self,
        index: usize,
        original: BlockWeights,
        compressed: &BlockWeights,
        cancel: &CancelToken,
    ) -> Result<CompressedBlock> {
        self.run(index, original, Some(compressed), cancel)
    }

    fn run(
        &mut self,
        index: usize,
        original: BlockWeights,
        compressed: Option<&BlockWeights>,
        cancel: &CancelToken,
    ) -> Result<CompressedBlock> {
        let types: Vec<ElementType> = original.linears.iter().map(element_type).collect();
        let FoldedBlock { mut weights, alphas, rewritten } = self.fold(index, original, cancel)?;
        let spec = self.spec;
        let count = spec.linears.len();
        let mut linears: Vec<Option<LinearReport>> = vec![None; count];
        let (mut factors, mut profiles) = (vec![None; count], vec![None; count]);
        let streams = self.input.stream.is_some();
        let mut runnable = streams.then(|| Block::prepare(self.backend, spec, index, &weights)).transpose()?;
        // What the dense model runs: the original weights, with the scales that were folded into them, so that both models
        // read the same channels.
        let mixed = self.input.dense.is_some();
        let original = mixed.then(|| Block::prepare(self.backend, spec, index, &weights)).transpose()?;
        let places = |points: &[TapPoint]| -> Vec<usize> {
            (0..spec.linears.len()).filter(|&place| points.contains(&spec.linears[place].slot.tap())).collect()
        };
        for stage in &self.recipe.stages(spec) {
            let held_out = self.stream().map_or(0, CalibrationStream::held_out);
            for points in split(stage, self.statistics_room, |point| statistics_bytes(spec, point, held_out, mixed)) {
                let started = Instant::now();
                let blocks = runnable.as_ref().map(|block| (block, original.as_ref()));
                let (mut captured, mut drift) = self.capture(blocks, &points, cancel)?;
                self.input.saved.iter().try_for_each(|saved| saved.add(index, &points, &mut captured))?;
                let CapturedInputs { mut statistics, mut held_out, outputs } = captured;
                if let Some(saved) = &self.saved {
                    let write = |(&point, found): (&TapPoint, &Calibration)| saved.write(index, point, found, &outputs);
                    statistics.iter().try_for_each(write)?;
                    saved.sync()?;
                }
                self.phases.calibrate += started.elapsed().as_secs_f64();
                let units: Vec<EoraUnit> = {
                    let places = places(&points);
                    self.units.iter().filter(|unit| places.contains(&unit.places[0])).cloned().collect()
                };
                for (i, unit) in units.iter().enumerate() {
                    cancel.check()?;
                    let tap = |unit: &EoraUnit| spec.linears[unit.places[0]].slot.tap();
                    let point = tap(unit);
                    let inputs = KnownInputs {
                        statistics: statistics.get(&point),
                        held_out: held_out.get(&point),
                        outputs: &outputs,
                        drift: drift.statistics.get(&point),
                        held_out_drift: drift.held_out.get(&point),
                    };
                    let found = self.compress_unit(index, unit, &weights, &types, compressed, inputs, cancel)?;
                    for (&place, mut found) in unit.places.iter().zip(found) {
                        found.report.alpha = alphas[place];
                        weights.linears[place] = found.weight;
                        linears[place] = Some(found.report);
                        (factors[place], profiles[place]) = (found.factors, found.profile);
                    }
                    if !units[i + 1..].iter().any(|later| tap(later) == point) {
                        statistics.remove(&point);
                        held_out.remove(&point);
                        drift.statistics.remove(&point);
                        drift.held_out.remove(&point);
                    }
                }
            }
            // Every pass of a stage has seen the block as it was before the stage.
            if let Some(block) = runnable.as_mut().filter(|_| self.inputs() != EoraInputs::Dense) {
                for place in places(stage) {
                    block.replace(place, self.backend.prepare(&weights.linears[place])?);
                }
            }
        }
        if let (Some(stream), Some(block)) = (&mut self.input.stream, &runnable) {
            let started = Instant::now();
            stream.advance(self.backend, block, cancel)?;
            if let (Some(stream), Some(block)) = (&mut self.input.dense, &original) {
                stream.advance(self.backend, block, cancel)?;
            }
            self.phases.calibrate += started.elapsed().as_secs_f64();
        }
        let linears = linears.into_iter().flatten().collect();
        Ok(CompressedBlock { weights, linears, rewritten, factors, profiles })
    }

    /// The inputs at some points of a block, and how far they are from those of its original where the activations of the
    /// dense model are carried along.
    fn capture(
        &mut self,
        blocks: Option<(&Block<B>, Option<&Block<B>>)>,
        points: &[TapPoint],
        cancel: &CancelToken,
    ) -> Result<(CapturedInputs, CapturedDrift)> {
        let (backend, spec) = (self.backend, self.spec);
        let CalibrationInput { stream, dense, .. } = &mut self.input;
        let (Some(stream), Some((block, original))) = (stream, blocks) else { return Ok(Default::default()) };
        match (dense, original) {
            (Some(dense), Some(original)) => {
                stream.capture_drift(dense, backend, (block, original), spec, points, cancel)
            }
            _ => Ok((stream.capture(backend, block, points, cancel)?, CapturedDrift::default())),
        }
    }

    /// The block as the block method rewrites it, or as it is without one.
    fn fold(&mut self, index: usize, original: BlockWeights, cancel: &CancelToken) -> Result<FoldedBlock> {
        let started = Instant::now();
        let folded = match (self.block_method, &mut self.input.stream) {
            (Some(method), Some(stream)) => {
                let stored = original.linears.first().map_or(ElementType::F32, element_type);
                let options = self.recipe.usual_options(stored);
                let folding = ScaleFolding { method, options, spec: self.spec, backend: self.backend };
                folding.fold(index, &original, stream, cancel)?
            }
            _ => FoldedBlock::unchanged(original),
        };
        self.phases.compress += started.elapsed().as_secs_f64();
        Ok(folded)
    }

    /// Compresses the Linears of a unit, or takes the `given` form of them, and compensates what was lost of all together.
    fn compress_unit(
        &mut self,
        index: usize,
        unit: &EoraUnit,
        original: &BlockWeights,
        types: &[ElementType],
        given: Option<&BlockWeights>,
        inputs: KnownInputs<'_>,
        cancel: &CancelToken,
    ) -> Result<Vec<CompressedLinear>> {
        let places = &unit.places;
        let names: Vec<String> =
            places.iter().map(|&place| self.spec.linear_name(index, &self.spec.linears[place])).collect();
        let mut compressed = Vec::with_capacity(places.len());
        for (name, &place) in names.iter().zip(places) {
            cancel.check()?;
            let given = given.map(|block| &block.linears[place]);
            let linear = &original.linears[place];
            let found = self.compress_linear(name, linear, types[place], given, inputs.statistics);
            compressed.push(found.map_err(|error| with_subject(error, name))?);
        }

        cancel.check()?;
        let started = Instant::now();
        let dense: Vec<&dyn RowSource> = places.iter().map(|&place| &original.linears[place].matrix as _).collect();
        let pool = ThreadPool::global();
        let mut known: Vec<Option<OutputSquares>> =
            places.iter().map(|place| inputs.outputs.get(place).cloned()).collect();
        let scales = match inputs.statistics {
            Some(statistics) if self.counts_relative() && dense.len() > 1 => {
                let given: Vec<Option<&OutputSquares>> = known.iter().map(Option::as_ref).collect();
                let energies = output_energies(&dense, statistics, &given, pool);
                for (known, &energy) in known.iter_mut().zip(&energies) {
                    known.get_or_insert_default().calibration = energy;
                }
                group_scales(&energies)
            }
            _ => vec![1.0; dense.len()],
        };
        let solved = self.solve(&dense, &compressed, &scales, &known, inputs, pool);
        let mut solved = solved.map_err(|error| match error.code {
            ErrorCode::ValueNotFinite => not_finite(&names, &dense, &compressed).unwrap_or(error),
            _ => with_subject(error, &names.join(", ")),
        })?;
        self.phases.compensate += started.elapsed().as_secs_f64();

        let mut first_row = 0;
        let mut all = Vec::with_capacity(places.len());
        for ((name, weight), scale) in names.iter().zip(compressed).zip(scales) {
            let rows = first_row..first_row + weight.matrix.rows();
            first_row = rows.end;
            let factors = match names.len() {
                1 => solved.factors.take(),
                _ => solved.factors.as_ref().map(|factors| factors.of_outputs(rows).scaled(1.0 / scale)),
            };
            let is_first = all.is_empty();
            // An A that several share is kept once.
            let counted =
                |factors: &LowRank| factors.stored_bits() - if is_first { 0 } else { factors.projection_bits() };
            let (bits, group_size, group_axis, stored_bits) = stored(&weight);
            let report = LinearReport {
                name: name.clone(),
                rows: weight.matrix.rows(),
                columns: unit.columns,
                bits,
                group_size,
                group_axis,
                alpha: None,
                rank: factors.as_ref().map_or(0, LowRank::rank),
                calibration_tokens: inputs.statistics.map(Calibration::tokens),
                stored_bits: stored_bits + factors.as_ref().map_or(0, counted),
                shared_with: names.iter().filter(|other| factors.is_some() && *other != name).cloned().collect(),
                error: solved.error,
                hold_out: solved.hold_out,
                dense_error: solved.dense_error,
                certificate: solved.certificate,
            };
            // What runs in the next blocks is what will be deployed, as far as that is known.
            let deployed = factors.as_ref().filter(|_| self.deployed_rank > 0);
            let deployed = deployed.map(|factors| factors.prefix(self.deployed_rank));
            let mut weight = weight;
            deployed.into_iter().for_each(|update| weight.compensate(update));
            all.push(CompressedLinear { weight, report, factors, profile: solved.profile.take() });
        }
        Ok(all)
    }

    /// Compresses a Linear, or takes the `given` form of it.
    fn compress_linear(
        &mut self,
        name: &str,
        original: &LinearWeight,
        stored: ElementType,
        given: Option<&LinearWeight>,
        statistics: Option<&Calibration>,
    ) -> Result<LinearWeight> {
        let WeightMatrix::Dense(dense) = &original.matrix else {
            return Err(Error::new(ErrorCode::QuantizationUnsupported, "the Linear is compressed already")
                .hint("Give the original checkpoint"));
        };
        if let Some(given) = given {
            return Ok(given.clone());
        }
        let started = Instant::now();
        let options = self.recipe.quantize_options(name, stored);
        // No token of the calibration may reach an expert: nothing but its weights is known then.
        let blind = statistics.is_none() && self.method.needs_calibration();
        let method = if blind { linear_method("rtn")? } else { self.method };
        let matrix = WeightMatrix::Quantized(method.compress(dense, statistics, &options, ThreadPool::global())?);
        self.phases.compress += started.elapsed().as_secs_f64();
        Ok(LinearWeight { bias: original.bias.clone(), ..LinearWeight::plain(matrix) })
    }

    /// The compensation of the Linears of a unit, whose outputs are multiplied with `scales`; `known` tells of them before
    /// that.
    fn solve(
        &self,
        dense: &[&dyn RowSource],
        compressed: &[LinearWeight],
        scales: &[f32],
        known: &[Option<OutputSquares>],
        inputs: KnownInputs<'_>,
        pool: &ThreadPool,
    ) -> Result<Solved> {
        let Some(statistics) = inputs.statistics else { return Ok(Solved::default()) };
        let dense = &StackedRows::new(dense.iter().copied().zip(scales.iter().copied()).collect());
        let compressed = &StackedRows::new(
            compressed.iter().zip(scales).map(|(linear, &scale)| (linear as &dyn RowSource, scale)).collect(),
        );
        let known: Option<Vec<(&OutputSquares, f32)>> =
            known.iter().zip(scales).map(|(known, &scale)| Some((known.as_ref()?, scale))).collect();
        let outputs = known.map(|known| OutputSquares::stacked(&known));
        let Some(recipe) = &self.recipe.eora else {
            let quantized = residual_error(dense, compressed, statistics, pool);
            let error = ResidualError { quantized, compensated: quantized, bound: quantized };
            return Ok(Solved { error: Some(error), ..Solved::default() });
        };
        let options = recipe.options()?;
        let solved = match (recipe.inputs, inputs.drift) {
            (EoraInputs::Mixed { mismatch }, Some(drift)) => {
                let hold_out = inputs.held_out.zip(inputs.held_out_drift);
                let inputs = MixedInputs { deployed: statistics, drift, share: mismatch, hold_out };
                compensate_mixed(dense, compressed, &inputs, outputs.as_ref(), &options, pool)?
            }
            (EoraInputs::Mixed { .. }, None) => {
                let message = "the inputs of the original model were not taken";
                return Err(Error::new(ErrorCode::Internal, message).subject("eora.inputs"));
            }
            _ => compensate(dense, compressed, statistics, inputs.held_out, outputs.as_ref(), &options, pool)?,
        };
        Ok(Solved {
            dense_error: solved.profile.dense_error(solved.profile.largest_rank()),
            hold_out: solved.profile.hold_out_error(solved.profile.largest_rank()),
            factors: solved.factors,
            error: Some(solved.error),
            certificate: solved.certificate,
            profile: Some(solved.profile),
        })
    }
}

/// Width of a code, weights per group, which way they lie, and bits in all.
fn stored(linear: &LinearWeight) -> (u8, Option<usize>, GroupAxis, u64) {
    match &linear.matrix {
        WeightMatrix::Quantized(matrix) => {
            let group_size = match matrix.group_size() {
                GroupSize::Columns(size) => Some(size),
                GroupSize::WholeRow => None,
            };
            (matrix.bits(), group_size, matrix.group_axis(), matrix.stored_bits())
        }
        WeightMatrix::Dense(matrix) => {
            let bits = matrix.element_type().bits();
            (bits as u8, None, GroupAxis::Input, (matrix.rows() * matrix.columns() * bits) as u64)
        }
    }
}

/// The type that a Linear is stored in.
fn element_type(linear: &LinearWeight) -> ElementType {
    match &linear.matrix {
        WeightMatrix::Dense(matrix) => matrix.element_type(),
        WeightMatrix::Quantized(matrix) => matrix.scale_type(),
    }
}

/// Which value of the Linears of a unit is NaN or infinite, before compression or after.
fn not_finite(names: &[String], dense: &[&dyn RowSource], compressed: &[LinearWeight]) -> Option<Error> {
    let first = |matrix: &dyn RowSource| {
        let mut row = vec![0.0; matrix.columns()];
        (0..matrix.rows()).find_map(|i| {
            matrix.row_to_f32(i, &mut row);
            row.iter().position(|value: &f32| !value.is_finite()).map(|column| (i, column))
        })
    };
    names.iter().zip(dense).zip(compressed).find_map(|((name, &dense), compressed)| {
        let (which, (row, column)) = match first(dense) {
            Some(place) => ("weight", place),
            None => ("compressed weight", first(compressed)?),
        };
        let message = format!("the {which} in row {row}, column {column} is NaN or infinite");
        Some(
            Error::new(ErrorCode::ValueNotFinite, message)
                .subject(name)
                .hint("The checkpoint is damaged; load it from its source again"),
        )
    })
}

fn with_subject(error: Error, name: &str) -> Error {
    if error.subject.is_empty() { error.subject(name) } else { error }
}
