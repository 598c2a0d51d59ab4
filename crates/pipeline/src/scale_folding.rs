use kintsugi_compress::{BlockMethod, GroupScales, QuantizeOptions, ScaleGroup, scale_columns};
use kintsugi_model::{
    Backend, Block, BlockWeights, DecoderSpec, FoldSource, LinearSlot, NormKind, NormWeight, ScaleFold, TapPoint,
};
use kintsugi_runtime::{CancelToken, Error, ErrorCode, Result, ThreadPool};
use kintsugi_weights::{DenseMatrix, ElementType, LinearWeight, WeightMatrix};

use crate::CalibrationStream;
use crate::calibration_stream::BlockPart;
use crate::memory_plan::SAMPLE_TOKENS;

/// Lets a method find the scales of every fold of the family and folds them into a block.
pub(crate) struct ScaleFolding<'a, B> {
    pub(crate) method: &'a dyn BlockMethod,
    /// What the weights will be rounded with.
    pub(crate) options: QuantizeOptions,
    pub(crate) spec: &'a DecoderSpec,
    pub(crate) backend: &'a B,
}

/// A block that computes what the original does, with other weights.
pub(crate) struct FoldedBlock {
    pub(crate) weights: BlockWeights,
    /// Exponent of the scale of the columns of each Linear, in the order of [`DecoderSpec::linears`].
    pub(crate) alphas: Vec<Option<f64>>,
    /// Names inside the block and values of the tensors beside the weights of the Linears that have changed.
    pub(crate) rewritten: Vec<(String, Vec<f32>)>,
}

impl FoldedBlock {
    /// The block as it is.
    pub(crate) fn unchanged(original: BlockWeights) -> Self {
        FoldedBlock { alphas: vec![None; original.linears.len()], weights: original, rewritten: Vec::new() }
    }
}

impl<B: Backend> ScaleFolding<'_, B> {
    /// Folds scales into `original`, block `index`, which comes next on `stream`.
    ///
    /// Candidates are judged by the squared change of the half of the block (attention or MLP) that they belong to, on
    /// the first tokens of the stream. All searches see the unscaled block.
    pub(crate) fn fold(
        &self,
        index: usize,
        original: &BlockWeights,
        stream: &mut CalibrationStream<B>,
        cancel: &CancelToken,
    ) -> Result<FoldedBlock> {
        let (spec, backend, pool) = (self.spec, self.backend, ThreadPool::global());
        let mut folded = FoldedBlock::unchanged(original.clone());
        if spec.family.folds.is_empty() {
            return Ok(folded);
        }
        let mut block = Block::prepare(backend, spec, index, original)?;
        let taps: Vec<TapPoint> = spec.family.folds.iter().map(|fold| fold.readers[0].tap()).collect();
        let statistics = stream.capture(backend, &block, &taps, cancel)?.statistics;
        let input = stream.first_rows(SAMPLE_TOKENS)?;
        let middle = stream.forward(backend, &block, BlockPart::Attention, &input, cancel)?;
        let output = stream.forward(backend, &block, BlockPart::Mlp, &middle, cancel)?;

        for (fold, tap) in spec.family.folds.iter().zip(&taps) {
            let in_attention = matches!(tap, TapPoint::AttentionInput | TapPoint::AttentionOutput);
            let (part, before, target) =
                if in_attention { (BlockPart::Attention, &input, &middle) } else { (BlockPart::Mlp, &middle, &output) };
            let places: Vec<usize> = fold.places(spec).collect();
            let readers: Vec<&DenseMatrix> =
                places.iter().map(|&place| dense(&original.linears[place])).collect::<Result<_>>()?;
            let channel_of = fold.channel_of(spec);
            let absorber = Absorber::of(fold, spec, original, &channel_of);
            let storable = |scales| absorber.as_ref().map_or_else(|| Vec::clone(&scales), |a| a.storable(&scales));
            let group =
                ScaleGroup { readers, calibration: &statistics[tap], channel_of: &channel_of, storable: &storable };
            let mut loss = |rounded: &[DenseMatrix]| {
                for (&place, candidate) in places.iter().zip(rounded) {
                    let candidate = with_matrix(&original.linears[place], candidate.clone());
                    block.replace(place, backend.prepare(&candidate)?);
                }
                let found = stream.forward(backend, &block, part, before, cancel)?;
                Ok(found.iter().zip(target).map(|(&a, &b)| (f64::from(a) - f64::from(b)).powi(2)).sum())
            };
            let found = self.method.scales(&group, &self.options, &mut loss, pool)?;
            for &place in &places {
                block.replace(place, backend.prepare(&original.linears[place])?);
                folded.alphas[place] = Some(found.alpha);
            }
            self.fold_into(&mut folded, fold, absorber, &channel_of, &found)?;
        }
        Ok(folded)
    }

    /// Multiplies the columns of the readers and divides the outputs of the source.
    fn fold_into(
        &self,
        folded: &mut FoldedBlock,
        fold: &ScaleFold,
        absorber: Option<Absorber>,
        channel_of: &[usize],
        GroupScales { scales, .. }: &GroupScales,
    ) -> Result<()> {
        let family = self.spec.family;
        let weights = &mut folded.weights;
        for place in fold.places(self.spec) {
            let linear = &mut weights.linears[place];
            let scaled = scale_columns(dense(linear)?, |column| scales[channel_of[column]]);
            *linear = with_matrix(linear, scaled);
        }
        let stored = absorber.as_ref().map(|absorber| absorber.divided(scales));
        match fold.source {
            FoldSource::AttentionNorm | FoldSource::MlpNorm => {
                let (name, norm) = match fold.source {
                    FoldSource::AttentionNorm => (family.attention_norm, &mut weights.attention_norm),
                    _ => (family.mlp_norm, &mut weights.mlp_norm),
                };
                let (Some(absorber), Some(stored)) = (absorber, stored) else {
                    return Err(Error::new(ErrorCode::Internal, "the norm takes no factors").subject(name));
                };
                *norm = NormWeight::Rms(stored.iter().map(|&value| absorber.offset + value).collect());
                folded.rewritten.push((format!("{name}.weight"), stored));
            }
            FoldSource::Rows(slot) => {
                let place = place_of(self.spec, slot)?;
                let linear = &mut weights.linears[place];
                let matrix = dense(linear)?;
                let (rows, columns) = (matrix.rows(), matrix.columns());
                let mut values = matrix.to_f32();
                let first = rows - scales.len();
                for (row, scale) in values[first * columns..].chunks_exact_mut(columns).zip(scales) {
                    row.iter_mut().for_each(|value| *value /= scale);
                }
                linear.matrix = WeightMatrix::Dense(DenseMatrix::from_f32(rows, columns, values));
                if let (Some(bias), Some(stored)) = (&mut linear.bias, stored) {
                    bias[first..].copy_from_slice(&stored);
                    folded.rewritten.push((format!("{}.bias", self.spec.linears[place].name), bias.clone()));
                }
            }
        }
        Ok(())
    }
}

/// The vector beside the weights of Linears that is divided by the scales of a fold and stored again: the weight of a
/// norm, or the biases of rows.
struct Absorber {
    /// What the block computes with: `offset` and what is stored.
    values: Vec<f32>,
    offset: f32,
    /// All types that may hold what is stored; the first is the narrowest.
    types: Vec<ElementType>,
}

impl Absorber {
    /// `None` for rows without biases, which take any factor: they are quantized after the division.
    fn of(fold: &ScaleFold, spec: &DecoderSpec, weights: &BlockWeights, channel_of: &[usize]) -> Option<Self> {
        let of_norm = |norm: &NormWeight| match (norm, spec.family.norm) {
            (NormWeight::Rms(values), NormKind::RmsPlusOne) => Some((values.clone(), 1.0)),
            (NormWeight::Rms(values), _) => Some((values.clone(), 0.0)),
            (NormWeight::Layer { .. }, _) => None,
        };
        let (values, offset) = match fold.source {
            FoldSource::AttentionNorm => of_norm(&weights.attention_norm)?,
            FoldSource::MlpNorm => of_norm(&weights.mlp_norm)?,
            FoldSource::Rows(slot) => {
                let bias = weights.linears[spec.place_of(slot)?].bias.as_ref()?;
                let channels = channel_of.iter().max().map_or(0, |&last| last + 1);
                (bias[bias.len() - channels..].to_vec(), 0.0)
            }
        };
        Some(Self::new(values, offset))
    }

    fn new(values: Vec<f32>, offset: f32) -> Self {
        let holds = |kind: &ElementType| values.iter().all(|&value| kind.round(value - offset) == value - offset);
        let narrow = [ElementType::Bf16, ElementType::F16].into_iter().filter(holds);
        let types = narrow.chain([ElementType::F32]).collect();
        Absorber { values, offset, types }
    }

    /// The factors by which the values really change when they are divided and stored again.
    fn storable(&self, scales: &[f32]) -> Vec<f32> {
        let factor = |(&value, &scale): (&f32, &f32)| {
            let stored = self.round(value / scale);
            let divided = self.offset + stored;
            let kept = self.types.iter().all(|kind| kind.round(stored) == stored);
            // Zero takes any factor. A channel that would be silenced or overflow stays as it is.
            match value {
                0.0 => scale,
                _ if divided != 0.0 && divided.is_finite() && kept => value / divided,
                _ => 1.0,
            }
        };
        self.values.iter().zip(scales).map(factor).collect()
    }

    /// What is stored after the division.
    fn divided(&self, scales: &[f32]) -> Vec<f32> {
        self.values.iter().zip(scales).map(|(value, scale)| self.round(value / scale)).collect()
    }

    fn round(&self, value: f32) -> f32 {
        self.types[0].round(value - self.offset)
    }
}

fn place_of(spec: &DecoderSpec, slot: LinearSlot) -> Result<usize> {
    spec.place_of(slot).ok_or_else(|| Error::new(ErrorCode::Internal, format!("the block has no {slot:?}")))
}

fn dense(linear: &LinearWeight) -> Result<&DenseMatrix> {
    match &linear.matrix {
        WeightMatrix::Dense(matrix) => Ok(matrix),
        WeightMatrix::Quantized(_) => {
            Err(Error::new(ErrorCode::QuantizationUnsupported, "the Linear is compressed already")
                .hint("Compress the original checkpoint"))
        }
    }
}

fn with_matrix(linear: &LinearWeight, matrix: DenseMatrix) -> LinearWeight {
    LinearWeight { matrix: WeightMatrix::Dense(matrix), bias: linear.bias.clone(), low_rank: None }
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use kintsugi_checkpoint::Checkpoint;
    use kintsugi_compress::BlockLoss;
    use kintsugi_kernels::Kernels;
    use kintsugi_model::{CpuBackend, Precision};
    use kintsugi_runtime::CpuLevel;

    use super::*;
    use crate::{ActivationPlace, CalibrationKind, CalibrationRecipe, CalibrationSource, CalibrationTokens};

    /// Scales between 1/4 and 4, no two alike.
    struct Uneven;

    impl BlockMethod for Uneven {
        fn name(&self) -> &'static str {
            "uneven"
        }

        fn scales(
            &self,
            group: &ScaleGroup<'_>,
            _: &QuantizeOptions,
            _: BlockLoss<'_>,
            _: &ThreadPool,
        ) -> Result<GroupScales> {
            let channels = group.channel_of.iter().max().map_or(0, |&last| last + 1);
            let scales = (0..channels).map(|i| ((i * i) as f32 * 0.37).sin() * 2.0).map(f32::exp2).collect();
            Ok(GroupScales { scales: (group.storable)(scales), alpha: 1.0, loss: 0.0, unscaled_loss: 0.0 })
        }
    }

    /// Folds uneven scales into the first block of a checkpoint. Gives the numbers of folds and of rewritten tensors,
    /// and by how much the output of the block has changed.
    fn fold(folder: &Path, text: PathBuf) -> (usize, usize, f64) {
        let checkpoint = Checkpoint::open(folder).unwrap();
        let spec = DecoderSpec::of(&checkpoint).unwrap();
        let source = CalibrationSource {
            file: text,
            kind: CalibrationKind::Text,
            field: "text".to_owned(),
            sequences: 2,
            seed: None,
            hold_out: 0,
            weight: 1.0,
        };
        let recipe =
            CalibrationRecipe { sources: vec![source], length: 32, subset: false, activations: ActivationPlace::Auto };
        let text = CalibrationTokens::read(&recipe, &checkpoint, &spec).unwrap();
        let backend = CpuBackend::with(Kernels::new(CpuLevel::best()).unwrap(), Precision::F32, ThreadPool::global());
        let mut stream = CalibrationStream::new(&checkpoint, &spec, &text, None).unwrap();
        let original = BlockWeights::read(&checkpoint, &spec, 0).unwrap();
        let cancel = CancelToken::new();
        let folding =
            ScaleFolding { method: &Uneven, options: QuantizeOptions::default(), spec: &spec, backend: &backend };
        let folded = folding.fold(0, &original, &mut stream, &cancel).unwrap();
        for (place, linear) in spec.linears.iter().enumerate() {
            let read = spec.family.folds.iter().any(|fold| fold.readers.contains(&linear.slot));
            assert_eq!(folded.alphas[place], read.then_some(1.0), "{}", linear.name);
            assert!(!read || folded.weights.linears[place].matrix != original.linears[place].matrix);
        }
        let rows = stream.first_rows(64).unwrap();
        let mut run = |weights: &BlockWeights| {
            let block = Block::prepare(&backend, &spec, 0, weights).unwrap();
            let out = stream.forward(&backend, &block, BlockPart::Whole, &rows, &cancel).unwrap();
            out.iter().zip(&rows).map(|(after, before)| after - before).collect::<Vec<f32>>()
        };
        let (before, after) = (run(&original), run(&folded.weights));
        let norm = |values: &[f32]| values.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>().sqrt();
        let difference: Vec<f32> = before.iter().zip(&after).map(|(a, b)| a - b).collect();
        (spec.family.folds.len(), folded.rewritten.len(), norm(&difference) / norm(&before))
    }

    #[test]
    fn folding_changes_the_weights_and_not_what_the_block_computes_in_any_family() {
        // Each weight and activation is rounded once or twice more in f32, 6 · 10⁻⁸ each, and softmax and activations
        // pass that on; a wrong channel anywhere gives a difference near 1.
        const BUDGET: f64 = 1e-5;
        let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..");
        for name in ["llama-7m", "tinystories-656k"] {
            let text = root.join("assets/text/calibration-wikipedia.txt");
            let (folds, rewritten, change) = fold(&root.join("assets").join(name), text);
            assert_eq!((folds, rewritten), (4, 2), "both norms, no biases");
            assert!(change < BUDGET, "{name}: {change:e}");
        }
        let scratch = tempfile::tempdir().unwrap();
        let text = scratch.path().join("text.txt");
        let words: String = (0..128u32).map(|i| format!("t{} ", i.wrapping_mul(2_654_435_761) >> 26)).collect();
        std::fs::write(&text, words).unwrap();
        let mut seen = 0;
        for entry in std::fs::read_dir(root.join("__test__/vectors/families")).unwrap() {
            let folder = entry.unwrap().path();
            let (folds, _, change) = fold(&folder, text.clone());
            assert!(change < BUDGET, "{}: {change:e}", folder.display());
            seen += usize::from(folds > 0);
        }
        assert!(seen > 15, "{seen}");
    }

    #[test]
    fn a_stored_vector_absorbs_its_factors_exactly() {
        for offset in [0.0, 1.0] {
            let stored = [1.5f32, -0.25, -offset, 3.0].map(|value| ElementType::Bf16.round(value));
            let values = stored.map(|value| value + offset).to_vec();
            let absorber = Absorber::new(values.clone(), offset);
            let scales = absorber.storable(&[1.7, 0.3, 9.0, 1e-44]);
            assert_eq!((scales[2], scales[3]), (9.0, 1.0), "zero takes any factor, what would overflow none");
            for ((value, scale), stored) in values.iter().zip(&scales).zip(absorber.divided(&scales)) {
                assert_eq!(ElementType::Bf16.round(stored), stored);
                assert!(((offset + stored) * scale - value).abs() <= value.abs() * 2.0 * f32::EPSILON);
            }
            assert_eq!(absorber.storable(&[1.0; 4]), [1.0; 4]);
            assert!((scales[0] / 1.7 - 1.0).abs() < 0.02);
        }
    }

    #[test]
    fn values_stay_within_every_type_that_may_hold_them() {
        let absorber = Absorber::new(vec![1.0, 2.0], 0.0);
        assert_eq!(absorber.types, [ElementType::Bf16, ElementType::F16, ElementType::F32]);
        assert_eq!(absorber.storable(&[2.0, 1e-6]), [2.0, 1.0], "2 · 10⁶ is no number of f16");
        let fine = Absorber::new(vec![1.0 + f32::EPSILON], 0.0);
        assert_eq!(fine.types, [ElementType::F32]);
    }
}
