use std::time::Instant;

use kintsugi_calibration::Calibration;
use kintsugi_compensate::{EoraOptions, ResidualError, eora, residual_error};
use kintsugi_compress::{BlockMethod, LinearMethod, linear_method};
use kintsugi_model::{Backend, Block, BlockWeights, DecoderSpec, TapPoint};
use kintsugi_runtime::{CancelToken, Error, ErrorCode, Result, ThreadPool};
use kintsugi_weights::{DenseMatrix, ElementType, GroupSize, LinearWeight, LowRank, QuantizedMatrix, WeightMatrix};

use crate::memory_plan::{split, statistics_bytes};
use crate::scale_folding::{FoldedBlock, ScaleFolding};
use crate::{CalibrationStream, LinearReport, MemoryPlan, PhaseSeconds, Recipe, SavedStatistics, StatisticsWriter};

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
    phases: PhaseSeconds,
}

/// Where the statistics of the inputs come from.
pub enum CalibrationInput<B: Backend> {
    /// There are none.
    None,
    /// From activations that are carried along.
    Stream(CalibrationStream<B>),
    /// From an earlier job.
    Saved(SavedStatistics),
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
        Ok(BlockCompressor { recipe, spec, backend, block_method, method, input, saved: None, statistics_room, phases })
    }

    /// Saves the statistics with `writer`, too.
    #[must_use]
    pub fn saving(self, writer: Option<StatisticsWriter>) -> Self {
        BlockCompressor { saved: writer, ..self }
    }

    /// The calibration activations, at the input of the next block.
    pub fn stream(&self) -> Option<&CalibrationStream<B>> {
        match &self.input {
            CalibrationInput::Stream(stream) => Some(stream),
            _ => None,
        }
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
        let types: Vec<ElementType> = original.linears.iter().map(element_type).collect();
        let FoldedBlock { mut weights, alphas, rewritten } = self.fold(index, original, cancel)?;
        let spec = self.spec;
        let mut linears: Vec<Option<LinearReport>> = vec![None; spec.linears.len()];
        let mut runnable = match &self.input {
            CalibrationInput::Stream(_) => Some(Block::prepare(self.backend, spec, index, &weights)?),
            _ => None,
        };
        let places = |points: &[TapPoint]| -> Vec<usize> {
            (0..spec.linears.len()).filter(|&place| points.contains(&spec.linears[place].slot.tap())).collect()
        };
        for stage in &self.recipe.stages(spec) {
            for points in split(stage, self.statistics_room, |point| statistics_bytes(spec, point)) {
                let started = Instant::now();
                let mut statistics = match (&mut self.input, &runnable) {
                    (CalibrationInput::Stream(stream), Some(block)) => {
                        stream.capture(self.backend, block, &points, cancel)?
                    }
                    (CalibrationInput::Saved(saved), _) => saved.read(index, &points)?,
                    _ => Default::default(),
                };
                if let Some(saved) = &self.saved {
                    statistics.iter().try_for_each(|(&point, statistics)| saved.write(index, point, statistics))?;
                    saved.sync()?;
                }
                self.phases.calibrate += started.elapsed().as_secs_f64();
                let places = places(&points);
                for (i, &place) in places.iter().enumerate() {
                    cancel.check()?;
                    let linear = &spec.linears[place];
                    let (name, point) = (spec.linear_name(index, linear), linear.slot.tap());
                    let (weight, mut report) = self
                        .compress_linear(&name, &weights.linears[place], types[place], statistics.get(&point))
                        .map_err(|error| with_subject(error, &name))?;
                    report.alpha = alphas[place];
                    weights.linears[place] = weight;
                    linears[place] = Some(report);
                    if !places[i + 1..].iter().any(|&later| spec.linears[later].slot.tap() == point) {
                        statistics.remove(&point);
                    }
                }
            }
            // Every pass of a stage has seen the block as it was before the stage.
            if let Some(block) = &mut runnable {
                for place in places(stage) {
                    block.replace(place, self.backend.prepare(&weights.linears[place])?);
                }
            }
        }
        if let (CalibrationInput::Stream(stream), Some(block)) = (&mut self.input, &runnable) {
            let started = Instant::now();
            stream.advance(self.backend, block, cancel)?;
            self.phases.calibrate += started.elapsed().as_secs_f64();
        }
        Ok(CompressedBlock { weights, linears: linears.into_iter().flatten().collect(), rewritten })
    }

    /// The block as the block method rewrites it, or as it is without one.
    fn fold(&mut self, index: usize, original: BlockWeights, cancel: &CancelToken) -> Result<FoldedBlock> {
        let started = Instant::now();
        let folded = match (self.block_method, &mut self.input) {
            (Some(method), CalibrationInput::Stream(stream)) => {
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

    fn compress_linear(
        &mut self,
        name: &str,
        original: &LinearWeight,
        stored: ElementType,
        statistics: Option<&Calibration>,
    ) -> Result<(LinearWeight, LinearReport)> {
        let pool = ThreadPool::global();
        let WeightMatrix::Dense(dense) = &original.matrix else {
            return Err(Error::new(ErrorCode::QuantizationUnsupported, "the Linear is compressed already")
                .hint("Compress the original checkpoint"));
        };
        let options = self.recipe.quantize_options(name, stored);
        let started = Instant::now();
        // No token of the calibration may reach an expert: nothing but its weights is known then.
        let blind = statistics.is_none() && self.method.needs_calibration();
        let method = if blind { linear_method("rtn")? } else { self.method };
        let quantized = method.compress(dense, statistics, &options, pool)?;
        self.phases.compress += started.elapsed().as_secs_f64();

        let started = Instant::now();
        let (low_rank, error) = self.compensate(dense, &quantized, statistics, pool)?;
        self.phases.compensate += started.elapsed().as_secs_f64();

        let report = LinearReport {
            name: name.to_owned(),
            rows: dense.rows(),
            columns: dense.columns(),
            bits: quantized.bits(),
            group_size: match options.group_size {
                GroupSize::Columns(size) => Some(size),
                GroupSize::WholeRow => None,
            },
            group_axis: quantized.group_axis(),
            alpha: None,
            rank: low_rank.as_ref().map_or(0, LowRank::rank),
            calibration_tokens: statistics.map(Calibration::tokens),
            stored_bits: quantized.stored_bits() + low_rank.as_ref().map_or(0, LowRank::stored_bits),
            error,
        };
        let matrix = WeightMatrix::Quantized(quantized);
        Ok((LinearWeight { matrix, bias: original.bias.clone(), low_rank }, report))
    }

    fn compensate(
        &self,
        dense: &DenseMatrix,
        quantized: &QuantizedMatrix,
        statistics: Option<&Calibration>,
        pool: &ThreadPool,
    ) -> Result<(Option<LowRank>, Option<ResidualError>)> {
        let Some(statistics) = statistics else { return Ok((None, None)) };
        let Some(recipe) = &self.recipe.eora else {
            let quantized = residual_error(dense, quantized, statistics, pool);
            return Ok((None, Some(ResidualError { quantized, compensated: quantized, bound: quantized })));
        };
        // bf16 factors are exact in every type that a server may load them in.
        let options = EoraOptions { rank: recipe.rank, factor_type: ElementType::Bf16 };
        let solved = eora(dense, quantized, statistics, &options, pool)?;
        Ok((solved.factors, Some(solved.error)))
    }
}

/// The type that a Linear is stored in.
fn element_type(linear: &LinearWeight) -> ElementType {
    match &linear.matrix {
        WeightMatrix::Dense(matrix) => matrix.element_type(),
        WeightMatrix::Quantized(matrix) => matrix.scale_type(),
    }
}

fn with_subject(error: Error, name: &str) -> Error {
    if error.subject.is_empty() { error.subject(name) } else { error }
}
