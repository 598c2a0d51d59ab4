use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use kintsugi_calibration::{Calibration, SumPart};
use kintsugi_checkpoint::{Checkpoint, NumberType, TensorFile, TensorFileWriter};
use kintsugi_compensate::OutputSquares;
use kintsugi_linalg::UpperTriangle;
use kintsugi_model::{DecoderSpec, LinearSpec, TapPoint};
use kintsugi_runtime::{Error, ErrorCode, Result, ScratchFile};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{CalibrationSource, CapturedInputs, Recipe};

/// The string in the header of a file of statistics that says what they are.
pub(crate) const STATISTICS_KEY: &str = "kintsugi.calibration";
const VERSION: u32 = 2;
/// What stands for the energy of outputs that is not known.
const UNKNOWN: f64 = -1.0;
/// Values of a second moment that are written at once.
const WRITE_VALUES: usize = 1 << 19;

/// What stands under [`STATISTICS_KEY`].
#[derive(Debug, Serialize, Deserialize)]
struct Description {
    version: u32,
    /// What they were taken from; see [`fingerprint`].
    model: String,
    /// Which activations: `deployed`, those behind blocks that are compressed as `recipe` says, or `dense`, those of the
    /// original model.
    stream: String,
    /// The recipe of the job that took them.
    recipe: Value,
    /// What a token counts in the sums, on average.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    token_weight: f64,
    /// Whether some tokens count more than others, so that those of one expert may count otherwise.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    mixture: bool,
}

fn one() -> f64 {
    1.0
}

fn is_one(value: &f64) -> bool {
    *value == 1.0
}

impl Description {
    /// What the file at `path` says about itself.
    fn of(file: &TensorFile, path: &Path) -> Result<Self> {
        let text = file.metadata().get(STATISTICS_KEY).map_or("", String::as_str);
        let description: Description = serde_json::from_str(text)
            .map_err(|error| mismatch(path, format!("the file does not say what statistics it holds: {error}")))?;
        if description.version != VERSION {
            let message = format!("the statistics have version {}, this release reads {VERSION}", description.version);
            return Err(mismatch(path, message));
        }
        Ok(description)
    }
}

/// `ERR_STATISTICS_MISMATCH` for the file at `path`.
pub(crate) fn mismatch(path: &Path, message: String) -> Error {
    Error::new(ErrorCode::StatisticsMismatch, message)
        .subject(path.display())
        .hint("Take statistics of this model with saveStatistics (--save-calibration)")
}

/// The architecture whose statistics the file at `path` holds.
///
/// # Errors
/// `ERR_STATISTICS_MISMATCH` when it holds none, or of another version.
pub(crate) fn statistics_architecture(file: &TensorFile, path: &Path) -> Result<String> {
    let description = Description::of(file, path)?;
    Ok(description.model.split(" of ").next().unwrap_or_default().to_string())
}

/// Statistics of every input of the Linears of a model, from an earlier job.
pub struct SavedStatistics {
    file: TensorFile,
    path: PathBuf,
    spec: DecoderSpec,
    /// What the sums are multiplied with.
    weight: f64,
    /// What a token counts in them already, on average.
    token_weight: f64,
    is_mixture: bool,
}

impl SavedStatistics {
    /// Opens the file of `source` and checks that it belongs to the model, and holds what was taken from activations that
    /// are called `stream`.
    ///
    /// # Errors
    /// `ERR_STATISTICS_MISMATCH` when it does not or is of another version, and what opening reports.
    pub fn open(source: &CalibrationSource, stream: &str, checkpoint: &Checkpoint, spec: &DecoderSpec) -> Result<Self> {
        let path = source.file.as_path();
        let file = TensorFile::open(path)?;
        let mismatch = |message: String| mismatch(path, message);
        let description = Description::of(&file, path)?;
        let model = fingerprint(checkpoint, spec)?;
        if description.model != model {
            return Err(mismatch(format!(
                "the statistics are of the model {}, this one is {model}",
                description.model
            )));
        }
        if description.stream != stream {
            let found = &description.stream;
            let error = mismatch(format!("the statistics are of {found} inputs, and {stream} ones are asked for"));
            return Err(error.hint(match stream {
                "dense" => "Take the statistics with eora.inputs 'dense', or leave that out here",
                _ => "Use eora.inputs 'dense', or take the statistics of a job without it",
            }));
        }
        for (name, _, count) in sums(spec) {
            if file.shape(&name) != Some(&[count]) {
                return Err(mismatch(format!("the tensor {name} is not there or has not {count} elements")));
            }
        }
        let token_weight = description.token_weight;
        if !(token_weight.is_finite() && token_weight > 0.0) {
            return Err(mismatch(format!("a token of the statistics counts {token_weight} times")));
        }
        let (path, weight) = (path.to_path_buf(), source.weight);
        let is_mixture = description.mixture;
        let saved = SavedStatistics { file, path, spec: spec.clone(), weight, token_weight, is_mixture };
        for block in 0..spec.layers {
            spec.tap_stages().concat().into_iter().try_for_each(|point| saved.tokens(block, point).map(|_| ()))?;
        }
        Ok(saved)
    }

    /// What a token counts in the sums as they are saved, on average.
    pub(crate) fn token_weight(&self) -> f64 {
        self.token_weight
    }

    /// Whether some of their tokens count more than others.
    pub(crate) fn is_mixture(&self) -> bool {
        self.is_mixture
    }

    /// Where they are.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Adds those at some points of a block to what was captured, with their weight; nothing at points that no token
    /// reached.
    pub(crate) fn add(&self, block: usize, points: &[TapPoint], captured: &mut CapturedInputs) -> Result<()> {
        let sums = &mut captured.statistics;
        for &point in points {
            let tokens = self.tokens(block, point)?;
            if tokens == 0 {
                continue;
            }
            let is_first = !sums.contains_key(&point);
            for (place, _) in readers(&self.spec, point) {
                let known = captured.outputs.remove(&place).or_else(|| is_first.then(OutputSquares::default));
                if let (Some(mut known), Some(energy)) = (known, self.output_energy(block, place)?) {
                    known.calibration += self.weight * energy;
                    captured.outputs.insert(place, known);
                }
            }
            let (name, width) = (point_name(&self.spec, block, point), width_at(&self.spec, point));
            let mut first = 0;
            let sums = sums.entry(point).or_insert_with(|| Calibration::zeros(width));
            // Of experts that is an average, as their tokens may be of one source.
            let counted = tokens as f64 * self.token_weight;
            sums.add((tokens, counted), self.weight, |part, out| match part {
                SumPart::SecondMoment(_) => {
                    let start = first;
                    first += out.len();
                    read_finite(&self.file, &format!("{name}.second_moment"), start, out)
                }
                SumPart::Sums => read_finite(&self.file, &format!("{name}.sums"), 0, out),
                SumPart::AbsoluteSums => read_finite(&self.file, &format!("{name}.absolute_sums"), 0, out),
            })?;
        }
        Ok(())
    }

    /// The energy of the outputs of a Linear; `None` where it is not in the file.
    fn output_energy(&self, block: usize, place: usize) -> Result<Option<f64>> {
        let name = energy_name(&self.spec, block, place);
        if self.file.shape(&name) != Some(&[1]) {
            return Ok(None);
        }
        let mut energy = [UNKNOWN];
        read_finite(&self.file, &name, 0, &mut energy)?;
        Ok(Some(energy[0]).filter(|&energy| energy >= 0.0))
    }

    /// The tokens that they were taken from.
    ///
    /// # Errors
    /// What reading the file reports.
    pub(crate) fn all_tokens(&self) -> Result<u64> {
        if self.spec.layers == 0 { Ok(0) } else { self.tokens(0, TapPoint::AttentionInput) }
    }

    /// How many tokens reached a point. Only an expert may have seen none.
    fn tokens(&self, block: usize, point: TapPoint) -> Result<u64> {
        let name = format!("{}.tokens", point_name(&self.spec, block, point));
        let tokens = self.file.integers(&name)?.first().copied().unwrap_or(0);
        let of_expert = matches!(point, TapPoint::ExpertInput(_) | TapPoint::ExpertActivation(_));
        match u64::try_from(tokens) {
            Ok(tokens) if tokens > 0 || of_expert => Ok(tokens),
            _ => Err(Error::new(ErrorCode::CheckpointCorrupt, format!("the statistics are of {tokens} tokens"))
                .subject(name)
                .hint("The file is damaged; take the statistics again")),
        }
    }
}

/// The second moment of the inputs at a point, `[width, width]`.
pub(crate) fn read_second_moment(file: &TensorFile, point: &str, width: usize) -> Result<UpperTriangle<f64>> {
    let name = format!("{point}.second_moment");
    let mut second_moment = UpperTriangle::zeros(width);
    let mut first = 0;
    for i in 0..width {
        read_finite(file, &name, first, second_moment.row_mut(i))?;
        first += width - i;
    }
    Ok(second_moment)
}

fn read_finite(file: &TensorFile, name: &str, first: usize, out: &mut [f64]) -> Result<()> {
    file.read_f64s(name, first, out)?;
    if out.iter().all(|value| value.is_finite()) {
        return Ok(());
    }
    Err(Error::new(ErrorCode::CheckpointNotFinite, "the statistics have values that are NaN or infinite")
        .subject(name)
        .hint("The file is damaged; take the statistics again"))
}

/// Saves the statistics of a job as they come. The file has its name when it is whole; until then `.partial` follows.
pub struct StatisticsWriter {
    file: TensorFileWriter,
    path: PathBuf,
    spec: DecoderSpec,
}

impl StatisticsWriter {
    /// Begins the file at `path`, or goes on with it when an earlier run of the job had finished `finished_blocks`.
    ///
    /// # Errors
    /// `ERR_RESUME_MISMATCH` when what that run had written is gone, `ERR_OUTPUT_BUSY` while another job writes the file,
    /// `ERR_OUTPUT_UNWRITABLE`.
    pub fn create(
        path: &Path,
        recipe: &Recipe,
        checkpoint: &Checkpoint,
        spec: &DecoderSpec,
        counts: (f64, bool),
        finished_blocks: usize,
    ) -> Result<Self> {
        let (description, tensors) = (describe(recipe, checkpoint, spec, counts)?, tensors(spec));
        let (path_now, string) = (partial(path), (STATISTICS_KEY, description.as_str()));
        let file = if finished_blocks == 0 {
            // What another job has left there may know experts that this one never reaches.
            TensorFileWriter::create(&path_now, &tensors, string)?
        } else {
            // A new file would be zeros for the blocks that are done.
            TensorFileWriter::resume(&path_now, &tensors, string)?.ok_or_else(|| {
                Error::new(ErrorCode::ResumeMismatch, "the statistics that the interrupted job saved are gone")
                    .subject(path.display())
                    .hint("Discard what the interrupted job left with fresh (--fresh)")
            })?
        };
        Ok(StatisticsWriter { file, path: path.to_path_buf(), spec: spec.clone() })
    }

    /// Bytes of the file, but for some digits of what a token of a mixture counts.
    ///
    /// # Errors
    /// What reading the checkpoint reports.
    pub(crate) fn bytes(recipe: &Recipe, checkpoint: &Checkpoint, spec: &DecoderSpec) -> Result<u64> {
        TensorFileWriter::length(&tensors(spec), (STATISTICS_KEY, &describe(recipe, checkpoint, spec, (1.0, false))?))
    }

    /// Writes the statistics at one point of a block, and what is known of the outputs of the Linears that read there.
    pub(crate) fn write(
        &self,
        block: usize,
        point: TapPoint,
        calibration: &Calibration,
        outputs: &BTreeMap<usize, OutputSquares>,
    ) -> Result<()> {
        for (place, _) in readers(&self.spec, point) {
            let energy = outputs.get(&place).map_or(UNKNOWN, |squares| squares.calibration);
            let energy = [if energy.is_finite() { energy } else { UNKNOWN }];
            self.file.write(&energy_name(&self.spec, block, place), 0, bytemuck::cast_slice(&energy))?;
        }
        let name = point_name(&self.spec, block, point);
        let write = |tensor: &str, first: usize, values: &[f64]| {
            self.file.write(&format!("{name}.{tensor}"), first, bytemuck::cast_slice(values))
        };
        let (mut first, mut values) = (0, Vec::with_capacity(WRITE_VALUES));
        for i in 0..calibration.width() {
            values.extend_from_slice(calibration.second_moment().row(i));
            if values.len() >= WRITE_VALUES || i + 1 == calibration.width() {
                write("second_moment", first, &values)?;
                first += values.len();
                values.clear();
            }
        }
        write("sums", 0, calibration.sums())?;
        write("absolute_sums", 0, calibration.absolute_sums())?;
        let tokens = [calibration.tokens() as i64];
        self.file.write(&format!("{name}.tokens"), 0, bytemuck::cast_slice(&tokens))
    }

    /// Returns when what was written is on the disk.
    pub(crate) fn sync(&self) -> Result<()> {
        self.file.sync()
    }

    /// Gives the file its name.
    pub(crate) fn finish(self) -> Result<()> {
        self.file.sync()?;
        fs::rename(partial(&self.path), &self.path).map_err(|error| {
            Error::io(ErrorCode::OutputUnwritable, &self.path, &error).hint("Check that the folder is writable")
        })
    }

    /// Whether a job that was to write the file at `path` has not ended.
    pub(crate) fn is_unfinished(path: &Path) -> bool {
        partial(path).is_file()
    }

    /// Removes what an unfinished job has written to `path`; of a job that runs nothing.
    pub(crate) fn discard(path: &Path) {
        let path = partial(path);
        if path.is_file() && ScratchFile::exclusive(&path).is_ok() {
            let _ = fs::remove_file(path);
        }
    }
}

fn partial(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(".partial");
    path.with_file_name(name)
}

fn describe(
    recipe: &Recipe,
    checkpoint: &Checkpoint,
    spec: &DecoderSpec,
    (token_weight, mixture): (f64, bool),
) -> Result<String> {
    let internal = |error: serde_json::Error| Error::new(ErrorCode::Internal, error.to_string());
    let description = Description {
        version: VERSION,
        model: fingerprint(checkpoint, spec)?,
        stream: recipe.stream_name().into(),
        recipe: serde_json::to_value(recipe).map_err(internal)?,
        token_weight,
        mixture,
    };
    serde_json::to_string(&description).map_err(internal)
}

/// Every tensor of the file: name, type, elements. What outputs are is not in files of earlier releases.
fn tensors(spec: &DecoderSpec) -> Vec<(String, NumberType, usize)> {
    let places = (0..spec.layers).flat_map(|block| (0..spec.linears.len()).map(move |place| (block, place)));
    let energies = places.map(|(block, place)| (energy_name(spec, block, place), NumberType::F64, 1));
    energies.chain(sums(spec)).collect()
}

/// Those of the inputs.
fn sums(spec: &DecoderSpec) -> Vec<(String, NumberType, usize)> {
    let mut tensors = Vec::new();
    for block in 0..spec.layers {
        for point in spec.tap_stages().concat() {
            let (name, width) = (point_name(spec, block, point), width_at(spec, point));
            let mut push = |tensor: &str, kind, count| tensors.push((format!("{name}.{tensor}"), kind, count));
            push("second_moment", NumberType::F64, width * (width + 1) / 2);
            push("sums", NumberType::F64, width);
            push("absolute_sums", NumberType::F64, width);
            push("tokens", NumberType::I64, 1);
        }
    }
    tensors
}

fn width_at(spec: &DecoderSpec, point: TapPoint) -> usize {
    readers(spec, point).next().map_or(0, |(_, linear)| linear.columns)
}

/// The Linears that read at a point, with their places.
fn readers(spec: &DecoderSpec, point: TapPoint) -> impl Iterator<Item = (usize, &LinearSpec)> {
    spec.linears.iter().enumerate().filter(move |(_, linear)| linear.slot.tap() == point)
}

fn energy_name(spec: &DecoderSpec, block: usize, place: usize) -> String {
    format!("{}.output_energy", spec.linear_name(block, &spec.linears[place]))
}

fn point_name(spec: &DecoderSpec, block: usize, point: TapPoint) -> String {
    format!("{}.{}", spec.block_name(block), place_name(point))
}

/// The name of a point inside its block.
pub(crate) fn place_name(point: TapPoint) -> String {
    match point {
        TapPoint::AttentionInput => "attention_input".to_owned(),
        TapPoint::AttentionOutput => "attention_output".to_owned(),
        TapPoint::MlpInput => "mlp_input".to_owned(),
        TapPoint::MlpActivation => "mlp_activation".to_owned(),
        TapPoint::ExpertInput(expert) => format!("experts.{expert}.input"),
        TapPoint::ExpertActivation(expert) => format!("experts.{expert}.activation"),
    }
}

/// Architecture, number of blocks, and a hash (FNV-1a) of the shapes of the Linears, the weights of the norms, and the
/// first and the middle row of embedding, head and Linears: the same for copies of a model, another for its relatives,
/// also for those that training has left the norms of.
fn fingerprint(checkpoint: &Checkpoint, spec: &DecoderSpec) -> Result<String> {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    let mut add = |bytes: &[u8]| {
        bytes.iter().for_each(|&byte| hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
    };
    for linear in &spec.linears {
        add(linear.name.as_bytes());
        add(&(linear.rows as u64).to_le_bytes());
        add(&(linear.columns as u64).to_le_bytes());
    }
    let mut weights = Vec::new();
    for block in 0..spec.layers {
        for norm in [spec.family.attention_norm, spec.family.mlp_norm] {
            let name = format!("{}.{norm}.weight", spec.block_name(block));
            if checkpoint.tensor(&name).is_some() {
                add(bytemuck::cast_slice(&checkpoint.vector(&name)?));
            }
        }
        weights.extend(sampled(checkpoint, spec).into_iter().map(|linear| spec.linear_name(block, linear)));
    }
    if checkpoint.reads_single_rows() {
        // A tied matrix may be stored under either name.
        weights.extend([spec.name(spec.family.embedding), spec.family.head].map(str::to_owned));
    }
    for name in weights {
        let name = format!("{name}.weight");
        let Some(tensor) = checkpoint.tensor(&name) else { continue };
        let rows = tensor.shape.first().copied().unwrap_or(0);
        add(&checkpoint.row_bytes(&name, 0)?);
        add(&checkpoint.row_bytes(&name, rows / 2)?);
    }
    Ok(format!("{} of {} blocks {hash:016x}", spec.family.architecture, spec.layers))
}

/// The Linears of a block that [`fingerprint`] looks at: one expert stands for all. Of a GGUF a row costs its matrix,
/// and the smallest one must do.
fn sampled<'a>(checkpoint: &Checkpoint, spec: &'a DecoderSpec) -> Vec<&'a LinearSpec> {
    let of_other_expert =
        |point| matches!(point, TapPoint::ExpertInput(expert) | TapPoint::ExpertActivation(expert) if expert > 0);
    let linears = spec.linears.iter().filter(|linear| !of_other_expert(linear.slot.tap()));
    if !checkpoint.reads_single_rows() {
        return linears.min_by_key(|linear| linear.rows * linear.columns).into_iter().collect();
    }
    linears.collect()
}
