use kintsugi_calibration::{CHUNK_TOKENS, Calibration, Drift};
use kintsugi_checkpoint::Checkpoint;
use kintsugi_compensate::{Residual, directions_bytes, mixed_bytes};
use kintsugi_compress::{AxisRule, tile_rows};
use kintsugi_kernels::PAGE_POSITIONS;
use kintsugi_model::{CpuBackend, DecoderSpec, HEAD_ROWS, LinearSpec, PositionRule, TapPoint};
use kintsugi_runtime::{Error, ErrorCode, Result, ThreadPool, available_memory_bytes};
use kintsugi_weights::ElementType;
use serde::Serialize;

use crate::activation_buffer::ActivationBuffer;
use crate::calibration_source::reading_bytes;
use crate::eora_unit::EoraUnit;
use crate::rank_ablation::AblationGroups;
use crate::{ActivationPlace, CalibrationRecipe, CalibrationStream, EoraRecipe, Recipe};

/// What the process has before a job begins: code, threads, the headers of the checkpoint, the tokenizer.
const BASE: u64 = 160 << 20;
/// Tokens that AWQ judges candidates on; at least one sequence.
pub(crate) const SAMPLE_TOKENS: usize = 1024;

/// The memory that a job takes at most, estimated from shapes, recipe and threads, and how it keeps within a budget.
///
/// The peak is the largest of five moments. *Text*: the calibration file while it becomes tokens, with nothing but
/// `base` beside it. *Start*: the embedding, read once to make the first activations. *Block*:
/// `weights + prepared + statistics`, and beside them either one forward pass or `quantized + solver`. *Ablation*:
/// what weighs ranks by the predictions of the model, where that is asked for. *End*: the factors of all blocks on their
/// way to the PEFT folder. To each come `base` and the activations, if they are in
/// memory. A compensation for mixed inputs runs both models: it takes activations, packed block and forward pass twice.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct MemoryPlan {
    /// The estimate.
    pub peak_bytes: u64,
    /// What the job may take: the option, or what the machine and the control groups of the process leave.
    pub budget_bytes: u64,
    /// Whether the calibration activations lie on disk.
    pub activations_on_disk: bool,
    /// Forward passes over the calibration tokens per block that take statistics: more than one where the statistics
    /// of a block do not fit together.
    pub passes: usize,
    /// What the estimate consists of.
    pub parts: MemoryParts,
    /// Bytes that the statistics of one pass may take.
    #[serde(skip)]
    pub(crate) statistics_room: u64,
}

/// Parts of a [`MemoryPlan`] in bytes: m×k are the outputs and inputs of a Linear, t is the number of threads.
#[derive(Clone, Copy, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct MemoryParts {
    /// The process, headers and tokenizer.
    pub base: u64,
    /// The calibration file while it is read, before everything else: a text takes about 128 times the
    /// length that is read of it.
    pub text: u64,
    /// The embedding and learned positions, at the start only.
    pub embedding: u64,
    /// The largest block as it is stored; AWQ: and once more as scaled f32.
    pub weights: u64,
    /// The block packed for the forward pass.
    pub prepared: u64,
    /// Second moments of the inputs that are taken in one pass: 4 k² each, 16 k² with the drift of mixed inputs, shared by
    /// the Linears that read one input.
    pub statistics: u64,
    /// One forward pass: activations of its rows, KV pages, chunks of 512 rows on their way to the second moments that
    /// are taken in it.
    pub forward: u64,
    /// What is left of the Linears that are done: a byte per weight, and scales.
    pub quantized: u64,
    /// The largest need of a solver. GPTQ: 4 k² for the factor and 128·13·k·t for tiles,
    /// whose rows are those of a group at least where groups lie along the outputs. EoRA: residual, second moments in f32,
    /// and a block-Krylov space or 40·min(m, k)² for the eigenproblem; with mixed inputs 8·m·k + 4·k² more. Errors: 1024·k·t. AWQ: five f32 copies of the Linears that share an input.
    pub solver: u64,
    /// The activations of all calibration tokens, 0 when they lie on disk.
    pub activations: u64,
    /// The factors of all blocks, at the end only.
    pub factors: u64,
    /// Ablations, behind the last block only: the residual streams of all models that run beside each other, and either
    /// a block with its factors or the head with the logits of some rows.
    pub ablation: u64,
}

impl MemoryPlan {
    /// Plans `recipe` for `tokens` of calibration within its budget, on the threads of the shared pool.
    ///
    /// # Errors
    /// `ERR_MEMORY_EXCEEDED` with the parts when it does not fit, whatever is put on disk or taken in turns.
    pub fn new(recipe: &Recipe, checkpoint: &Checkpoint, spec: &DecoderSpec, tokens: usize) -> Result<Self> {
        Self::beside(0, recipe, checkpoint, spec, tokens)
    }

    /// The same, with so many bytes of weights beside those of a block.
    ///
    /// # Errors
    /// As [`MemoryPlan::new`].
    pub(crate) fn beside(
        weights: u64,
        recipe: &Recipe,
        checkpoint: &Checkpoint,
        spec: &DecoderSpec,
        tokens: usize,
    ) -> Result<Self> {
        let budget = recipe.memory.or_else(available_memory_bytes).unwrap_or(u64::MAX);
        let threads = ThreadPool::global().threads();
        Self::within(budget, &Shapes { recipe, checkpoint, spec, tokens, threads, beside: weights })
    }

    fn within(budget_bytes: u64, shapes: &Shapes<'_>) -> Result<Self> {
        let recipe = shapes.recipe;
        let mut parts = shapes.parts();
        let all = shapes.statistics(&shapes.points());
        let largest = shapes.points().iter().map(|&point| shapes.statistics(&[point])).max().unwrap_or(0);
        let activations = shapes.activations();
        let asked = recipe.calibration.as_ref().map_or(ActivationPlace::Auto, |calibration| calibration.activations);
        let fits = |parts: &MemoryParts| parts.peak() <= budget_bytes;

        (parts.statistics, parts.activations) = (all, activations);
        let on_disk = match asked {
            ActivationPlace::Memory => false,
            ActivationPlace::Disk => true,
            ActivationPlace::Auto => !fits(&parts),
        } && activations > 0;
        if on_disk {
            parts.activations = 0;
        }
        let mut statistics_room = u64::MAX;
        if !fits(&parts) {
            parts.statistics = largest;
            let rest = parts.peak() - largest;
            statistics_room = budget_bytes.saturating_sub(rest).max(largest);
        }
        let passes: Vec<Vec<TapPoint>> = shapes
            .stages()
            .iter()
            .flat_map(|stage| split(stage, statistics_room, |point| shapes.statistics(&[point])))
            .collect();
        parts.statistics = passes.iter().map(|pass| shapes.statistics(pass)).max().unwrap_or(0);
        parts.forward = passes.iter().map(|pass| shapes.forward(pass)).max().unwrap_or(0);
        let plan = MemoryPlan {
            peak_bytes: parts.peak(),
            budget_bytes,
            activations_on_disk: on_disk,
            passes: if activations > 0 { passes.len() } else { 0 },
            parts,
            statistics_room,
        };
        if fits(&parts) { Ok(plan) } else { Err(plan.refusal(recipe)) }
    }

    fn refusal(&self, recipe: &Recipe) -> Error {
        let parts: Vec<String> = self
            .parts
            .named()
            .into_iter()
            .filter(|(_, bytes)| *bytes > 0)
            .map(|(name, bytes)| format!("{name} {}", mebibytes(bytes)))
            .collect();
        let (peak, budget) = (mebibytes(self.peak_bytes), mebibytes(self.budget_bytes));
        let message = format!("the job needs about {peak}, and {budget} are there ({})", parts.join(", "));
        let on_disk = recipe.calibration.as_ref().is_some_and(|c| c.activations == ActivationPlace::Memory);
        let largest = self.parts.named().into_iter().max_by_key(|(_, bytes)| *bytes).map_or("", |(name, _)| name);
        let way = match largest {
            "activations" if on_disk => "Let calibration.activations be 'auto'",
            "text" => "Use a smaller calibration file, or one in JSONL",
            "forward" => "Use a smaller calibration.length",
            "ablation" => "Use other eora.rankWeights",
            "solver" | "factors" if recipe.eora.is_some() => "Leave out eora or use a smaller rank",
            _ => "Use a machine with that much memory",
        };
        Error::new(ErrorCode::MemoryExceeded, message)
            .subject("memory")
            .hint(format!("{way}, or allow {peak} with memory (--memory) where more is free than the system says"))
    }
}

impl MemoryParts {
    fn peak(&self) -> u64 {
        let block = self.weights + self.prepared + self.statistics + self.forward.max(self.quantized + self.solver);
        let job = self.activations.saturating_add(block.max(self.embedding).max(self.factors).max(self.ablation));
        self.base.saturating_add(self.text.max(job))
    }

    /// All parts with their names.
    pub fn named(&self) -> [(&'static str, u64); 12] {
        [
            ("base", self.base),
            ("text", self.text),
            ("embedding", self.embedding),
            ("weights", self.weights),
            ("prepared", self.prepared),
            ("statistics", self.statistics),
            ("forward", self.forward),
            ("quantized", self.quantized),
            ("solver", self.solver),
            ("activations", self.activations),
            ("factors", self.factors),
            ("ablation", self.ablation),
        ]
    }
}

/// Points in their order, as many at a time as `room` holds, and at least one.
pub(crate) fn split(points: &[TapPoint], room: u64, bytes: impl Fn(TapPoint) -> u64) -> Vec<Vec<TapPoint>> {
    let mut passes: Vec<(Vec<TapPoint>, u64)> = Vec::new();
    for &point in points {
        match passes.last_mut() {
            Some((pass, sum)) if sum.saturating_add(bytes(point)) <= room => {
                pass.push(point);
                *sum += bytes(point);
            }
            _ => passes.push((vec![point], bytes(point))),
        }
    }
    passes.into_iter().map(|(pass, _)| pass).collect()
}

/// Bytes of the statistics at one point of `spec`, and of the inputs of so many tokens that take no part in them; of
/// `mixed` inputs those of the drift, too.
pub(crate) fn statistics_bytes(spec: &DecoderSpec, point: TapPoint, held_out: usize, mixed: bool) -> u64 {
    let reads = |linear: &&LinearSpec| linear.slot.tap() == point;
    let of = |linear: &LinearSpec| {
        let rows = (held_out * linear.columns * 4) as u64;
        Calibration::bytes(linear.columns) + rows + if mixed { Drift::bytes(linear.columns) + rows } else { 0 }
    };
    spec.linears.iter().find(reads).map_or(0, of)
}

struct Shapes<'a> {
    recipe: &'a Recipe,
    checkpoint: &'a Checkpoint,
    spec: &'a DecoderSpec,
    /// Of calibration.
    tokens: usize,
    threads: usize,
    /// Bytes of weights beside those of a block.
    beside: u64,
}

impl Shapes<'_> {
    fn parts(&self) -> MemoryParts {
        let (spec, recipe) = (self.spec, self.recipe);
        let weights: u64 = spec.linears.iter().map(|linear| self.stored(linear)).sum();
        let elements: u64 = spec.linears.iter().map(|linear| (linear.rows * linear.columns) as u64).sum();
        let folds = recipe.block_method().is_some();
        let calibrated = recipe.passes().is_some();
        let blocks = spec.layers as u64;
        let factors = recipe.eora.as_ref().map(|eora| eora.shares(spec)).unwrap_or_default();
        let values = factors.iter().zip(&spec.linears).map(|(share, l)| share.rank * (l.rows + l.columns));
        let factor_values = values.sum::<usize>() as u64;
        let units = recipe.eora.as_ref().map(|eora| eora.units(spec)).unwrap_or_default();
        let solvers = spec.linears.iter().map(|linear| self.solver(linear));
        let solvers = solvers.chain(units.iter().map(|unit| self.compensation(unit)));
        let mut parts = MemoryParts {
            base: BASE,
            text: recipe.calibration.as_ref().map_or(0, |calibration| {
                let of_source = |source| reading_bytes(source, calibration.length);
                calibration.texts().map(of_source).max().unwrap_or(0)
            }),
            embedding: if calibrated { self.embedding() } else { 0 },
            weights: weights + self.beside + if folds { elements * 4 } else { 0 },
            // Linears with groups along the outputs are packed as f32.
            prepared: match (calibrated, folds || recipe.group_axis != AxisRule::Input) {
                (false, _) => 0,
                (true, false) => weights * self.models(),
                (true, true) => elements * 4 * self.models(),
            },
            statistics: 0,
            forward: self.forward(&self.points()),
            quantized: elements + elements / self.recipe.group_size.unwrap_or(4096) as u64 * 5,
            solver: solvers.max().unwrap_or(0).max(self.folding()),
            activations: 0,
            // As f32 in memory, and as bf16 on the way to the file.
            factors: blocks * factor_values * 6,
            ablation: 0,
        };
        if recipe.eora.as_ref().is_some_and(EoraRecipe::ablates) {
            parts.ablation = self.ablation(&parts, factor_values * 6);
        }
        parts
    }

    /// Streams in f32, the input and output of the one that runs twice among them. A block as it is read, packed, with
    /// factors of so many bytes; the head likewise, and logits of the model with all factors and of another.
    fn ablation(&self, parts: &MemoryParts, factors: u64) -> u64 {
        let units = self.recipe.eora.as_ref().map(|eora| eora.units(self.spec)).unwrap_or_default();
        let streams = AblationGroups::new(self.spec, &units).count() as u64 + 4;
        let rows = AblationGroups::TOKENS.min(self.tokens) as u64;
        let block = parts.weights + parts.prepared + parts.forward + factors;
        let logits = 2 * (HEAD_ROWS * self.spec.vocabulary_size) as u64 * 4;
        streams * rows * self.spec.hidden_size as u64 * 4 + block.max(2 * self.embedding() + logits)
    }

    /// The stages that are captured after each other, whatever the memory.
    fn stages(&self) -> Vec<Vec<TapPoint>> {
        if self.recipe.calibration.is_some() { self.recipe.stages(self.spec) } else { Vec::new() }
    }

    fn points(&self) -> Vec<TapPoint> {
        if self.recipe.calibration.is_some() { self.spec.tap_stages().concat() } else { Vec::new() }
    }

    fn statistics(&self, points: &[TapPoint]) -> u64 {
        points.iter().map(|&point| statistics_bytes(self.spec, point, self.held_out(), self.is_mixed())).sum()
    }

    /// Tokens that take no part in the statistics.
    fn held_out(&self) -> usize {
        let held_out = self.recipe.passes().map_or(0, CalibrationRecipe::most_held_out);
        held_out.min(self.tokens)
    }

    fn activations(&self) -> u64 {
        ActivationBuffer::bytes(self.tokens, self.spec.hidden_size).saturating_mul(self.models())
    }

    fn is_mixed(&self) -> bool {
        self.recipe.eora.as_ref().is_some_and(|eora| eora.inputs.is_mixed())
    }

    /// How many run over the calibration.
    fn models(&self) -> u64 {
        if self.is_mixed() { 2 } else { 1 }
    }

    /// Bytes of a Linear as it is read.
    fn stored(&self, linear: &LinearSpec) -> u64 {
        self.matrix(&self.spec.linear_name(0, linear), linear.rows * linear.columns)
    }

    /// Bytes of the embedding and of learned positions as they are read.
    fn embedding(&self) -> u64 {
        let (spec, family) = (self.spec, self.spec.family);
        // A tied matrix may be stored under either name.
        let stored = spec.name(family.embedding);
        let stored = if self.checkpoint.has_linear(stored) { stored } else { family.head };
        let tokens = self.matrix(stored, spec.vocabulary_size * spec.hidden_size);
        match family.positions {
            PositionRule::Learned(name) => {
                tokens + self.matrix(spec.name(name), spec.context_length * spec.hidden_size)
            }
            PositionRule::Rotary { .. } => tokens,
        }
    }

    /// Bytes of a matrix of so many elements as it is read.
    fn matrix(&self, name: &str, elements: usize) -> u64 {
        let name = format!("{name}.weight");
        let dtype = self.checkpoint.tensor(&name).map(|tensor| tensor.dtype.to_ascii_lowercase());
        let bits = match dtype.as_deref() {
            Some("bf16" | "f16") => 16,
            _ => ElementType::F32.bits(),
        };
        elements as u64 * bits as u64 / 8
    }

    /// One forward pass that takes statistics at `points`.
    fn forward(&self, points: &[TapPoint]) -> u64 {
        let Some(calibration) = self.recipe.passes() else { return 0 };
        let spec = self.spec;
        let rows = CalibrationStream::<CpuBackend>::rows_of_a_pass(calibration.length) as u64;
        let widest = |rows: fn(&LinearSpec) -> usize| spec.linears.iter().map(rows).max().unwrap_or(0) as u64;
        let mlp = match &spec.experts {
            Some(experts) => spec.intermediate_size.max(2 * experts.width),
            None => spec.intermediate_size,
        };
        let row = 6 * spec.hidden_size + 2 * spec.query_width() + 2 * spec.kv_width() + 3 * mlp;
        let pages = rows.next_multiple_of(PAGE_POSITIONS as u64) * 2 * spec.kv_width() as u64 * 4;
        let chunks: u64 = points.iter().map(|&point| self.width(point)).sum::<u64>() * CHUNK_TOKENS as u64 * 4;
        let widened = CHUNK_TOKENS as u64 * widest(|linear| linear.columns) * 8;
        let pass = rows * row as u64 * 4 + pages + 128 * 4 * (widest(|l| l.columns) + widest(|l| l.rows));
        if !self.is_mixed() {
            return pass + chunks + widened;
        }
        // The inputs of both, and the chunks of their pairs.
        let inputs = rows * (points.iter().map(|&point| self.width(point)).sum::<u64>() + widest(|l| l.columns)) * 4;
        2 * pass + inputs + 3 * chunks + 2 * widened
    }

    fn width(&self, point: TapPoint) -> u64 {
        let reads = |linear: &&LinearSpec| linear.slot.tap() == point;
        self.spec.linears.iter().find(reads).map_or(0, |linear| linear.columns as u64)
    }

    /// The compensation of a Linear, or of those that share an A: Δ, and beside it the largest of three moments. Energies: second moments in f32.
    /// Directions of a block-Krylov space: its basis and what becomes of a block; of all: the eigenproblem of the smaller
    /// side, behind a QR where Δ is tall. Factors: both in f64 and f32, three times over the inputs.
    fn compensation(&self, unit: &EoraUnit) -> u64 {
        let Some(eora) = &self.recipe.eora else { return 0 };
        let (m, k, rank) = (unit.rows, unit.columns, unit.rank(eora.rank));
        let [rows, columns, wide_rank] = [m, k, rank].map(|size| size as u64);
        let factors = wide_rank * (rows + columns) * 36;
        let directions = directions_bytes(m, k, rank);
        // Inputs that took no part: two halves in f32, one of them in f64.
        let held_out = 8 * self.held_out() as u64 * columns;
        // Statistics that are centred, and the same inputs less their mean.
        let mixed = if self.is_mixed() { mixed_bytes(m, k) + 2 * held_out } else { 0 };
        let centred = if eora.affine { Calibration::bytes(k) + held_out / 2 } else { 0 };
        Residual::bytes(m, k) + centred + mixed + directions.max(factors + held_out)
    }

    fn solver(&self, linear: &LinearSpec) -> u64 {
        let (m, k, t) = (linear.rows as u64, linear.columns as u64, self.threads as u64);
        let tile_rows =
            tile_rows(&self.recipe.quantize_options(&self.spec.linear_name(0, linear), ElementType::F16)) as u64;
        let tiles = t.min(m.div_ceil(tile_rows)) * tile_rows.min(m);
        let bands = if self.recipe.group_axis == AxisRule::Input { 0 } else { 8 * k * tiles + m * k };
        let gptq = if self.recipe.solves_gptq() { Calibration::bytes(linear.columns) + 13 * k * tiles } else { 0 };
        let errors = t * (1024 * k + 256 * 256 * 8);
        // Packed and encoded for the file, one byte per weight at most.
        gptq.max(bands).max(errors).max(m * k)
    }

    /// What a sample of tokens takes that runs through the block again and again: as input and output, twice each.
    fn sample(&self) -> u64 {
        SAMPLE_TOKENS.max(self.recipe.least_calibration_tokens()) as u64 * self.spec.hidden_size as u64 * 4 * 4
    }

    fn folding(&self) -> u64 {
        if self.recipe.block_method().is_none() {
            return if self.recipe.bit_budget.is_some() { self.sample() + self.forward(&self.points()) } else { 0 };
        }
        let readers = |point: TapPoint| {
            let of_point = self.spec.linears.iter().filter(move |linear| linear.slot.tap() == point);
            of_point.map(|linear| (linear.rows * linear.columns) as u64).sum::<u64>()
        };
        let largest = self.points().iter().map(|&point| readers(point)).max().unwrap_or(0);
        5 * 4 * largest + self.sample() + self.forward(&self.points())
    }
}

fn mebibytes(bytes: u64) -> String {
    format!("{} MiB", bytes.div_ceil(1 << 20))
}
