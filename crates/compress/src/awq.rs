use kintsugi_calibration::Calibration;
use kintsugi_runtime::{Error, ErrorCode, Result, ThreadPool};
use kintsugi_weights::DenseMatrix;

use crate::{BlockLoss, BlockMethod, Clip, GroupScales, QuantizeOptions, ScaleGroup, rtn};

/// Exponents that are tried: `k / ALPHAS` for `k = 0 … ALPHAS`.
const ALPHAS: usize = 20;
/// Smallest factor before normalisation: what channels without activation get.
const SMALLEST: f64 = 1e-4;

/// AWQ: channels that activations make important are magnified before rounding and shrunk back in front of it.
#[derive(Clone, Copy, Debug)]
pub struct Awq;

impl BlockMethod for Awq {
    fn name(&self) -> &'static str {
        "awq"
    }

    fn scales(
        &self,
        group: &ScaleGroup<'_>,
        options: &QuantizeOptions,
        loss: BlockLoss<'_>,
        pool: &ThreadPool,
    ) -> Result<GroupScales> {
        awq_scales(group, options, loss, pool)
    }
}

/// The scale search of AWQ (arXiv 2306.00978, section 3.2, and its reference implementation).
///
/// With `a_c` the mean absolute activation of channel c, candidates are `s = max(a^α, 10⁻⁴)`, divided by
/// `√(max s · min s)`, for α in `0, 0.05, …, 1`; each is judged by the loss of the block with `Q(W diag s) diag s⁻¹` for
/// the readers, Q being [`rtn`] without clipping. α = 0 is the unscaled weight, so the loss that is found never exceeds
/// that of rounding to nearest.
///
/// # Errors
/// Those of [`rtn`] and of `loss`; `ERR_SHAPE_MISMATCH` when weights, statistics and channels do not fit together.
pub fn awq_scales(
    group: &ScaleGroup<'_>,
    options: &QuantizeOptions,
    loss: BlockLoss<'_>,
    pool: &ThreadPool,
) -> Result<GroupScales> {
    let columns = group.channel_of.len();
    let channels = group.channel_of.iter().max().map_or(0, |&last| last + 1);
    if group.calibration.width() != columns || group.readers.iter().any(|reader| reader.columns() != columns) {
        let message = format!("{columns} inputs, but statistics or weights of another width");
        return Err(Error::new(ErrorCode::ShapeMismatch, message).subject("scale group"));
    }
    let activations = channel_means(group.calibration, group.channel_of, channels);
    let options = QuantizeOptions { clip: Clip::Never, ..options.clone() };
    let mut best: Option<GroupScales> = None;
    let mut unscaled_loss = f64::INFINITY;
    for step in 0..=ALPHAS {
        let alpha = step as f64 / ALPHAS as f64;
        let scales = (group.storable)(candidate(&activations, alpha));
        let mut rounded = Vec::with_capacity(group.readers.len());
        for reader in &group.readers {
            let scaled = scale_columns(reader, |column| scales[group.channel_of[column]]);
            let quantized = rtn(&scaled, None, &options, pool)?;
            let dense = DenseMatrix::from_f32(reader.rows(), columns, quantized.to_f32());
            rounded.push(scale_columns(&dense, |column| 1.0 / scales[group.channel_of[column]]));
        }
        let found = loss(&rounded)?;
        if step == 0 {
            unscaled_loss = found;
        }
        if best.as_ref().is_none_or(|best| found < best.loss) {
            best = Some(GroupScales { scales, alpha, loss: found, unscaled_loss });
        }
    }
    best.ok_or_else(|| Error::new(ErrorCode::Internal, "no scale was tried"))
}

/// `W diag(s)`, in f32.
pub fn scale_columns(weight: &DenseMatrix, scale: impl Fn(usize) -> f32) -> DenseMatrix {
    let columns = weight.columns();
    let scales: Vec<f32> = (0..columns).map(scale).collect();
    let mut values = weight.to_f32();
    for row in values.chunks_exact_mut(columns.max(1)) {
        row.iter_mut().zip(&scales).for_each(|(value, scale)| *value *= scale);
    }
    DenseMatrix::from_f32(weight.rows(), columns, values)
}

/// Mean absolute activation of each channel, over the tokens and over the columns that read it; 1 on average.
fn channel_means(calibration: &Calibration, channel_of: &[usize], channels: usize) -> Vec<f64> {
    let (mut sums, mut counts) = (vec![0.0; channels], vec![0usize; channels]);
    for (&channel, &sum) in channel_of.iter().zip(calibration.absolute_sums()) {
        sums[channel] += sum;
        counts[channel] += 1;
    }
    for (sum, &count) in sums.iter_mut().zip(&counts) {
        *sum /= count.max(1) as f64;
    }
    let mean = sums.iter().sum::<f64>() / channels.max(1) as f64;
    if mean > 0.0 { sums.iter().map(|sum| sum / mean).collect() } else { vec![1.0; channels] }
}

fn candidate(activations: &[f64], alpha: f64) -> Vec<f32> {
    let scales: Vec<f64> = activations.iter().map(|activation| activation.powf(alpha).max(SMALLEST)).collect();
    let (least, most) = scales.iter().fold((f64::INFINITY, 0.0f64), |(a, b), &scale| (a.min(scale), b.max(scale)));
    scales.iter().map(|scale| (scale / (least * most).sqrt()) as f32).collect()
}

#[cfg(test)]
mod tests {
    use kintsugi_calibration::CalibrationBuilder;
    use kintsugi_linalg::{MatrixView, quadratic_trace};
    use kintsugi_testkit::matrices;
    use kintsugi_weights::GroupSize;

    use super::*;

    fn calibration(seed: u64, columns: usize, pool: &ThreadPool) -> Calibration {
        let mut builder = CalibrationBuilder::new(columns);
        builder.push(&matrices::activations(seed, 400, columns), pool).unwrap();
        builder.finish(pool)
    }

    /// `Σ tr(D S Dᵀ)` over the readers.
    fn own_loss(readers: &[DenseMatrix], rounded: &[DenseMatrix], calibration: &Calibration, pool: &ThreadPool) -> f64 {
        let energy = |(reader, rounded): (&DenseMatrix, &DenseMatrix)| {
            let pairs = reader.to_f32().into_iter().zip(rounded.to_f32());
            let difference: Vec<f64> = pairs.map(|(a, b)| f64::from(a) - f64::from(b)).collect();
            let view = MatrixView::new(&difference, reader.rows(), reader.columns());
            quadratic_trace(view, calibration.second_moment(), pool)
        };
        readers.iter().zip(rounded).map(energy).sum()
    }

    fn search(readers: &[DenseMatrix], calibration: &Calibration, channel_of: &[usize], bits: u8) -> GroupScales {
        let pool = ThreadPool::with_threads(2);
        let options = QuantizeOptions { bits, group_size: GroupSize::Columns(64), ..Default::default() };
        let storable = |scales| scales;
        let group = ScaleGroup { readers: readers.iter().collect(), calibration, channel_of, storable: &storable };
        awq_scales(&group, &options, &mut |rounded| Ok(own_loss(readers, rounded, calibration, &pool)), &pool).unwrap()
    }

    #[test]
    fn the_loss_never_exceeds_that_of_rounding_to_nearest_and_falls_with_outliers() {
        let pool = ThreadPool::with_threads(2);
        let columns = 148;
        let channel_of: Vec<usize> = (0..columns).collect();
        for bits in [2, 3, 4, 5, 6, 8] {
            let readers: Vec<DenseMatrix> = [(1, 30), (2, 17)]
                .map(|(seed, rows)| DenseMatrix::from_f32(rows, columns, matrices::weights(seed, rows, columns)))
                .into();
            let calibration = calibration(3, columns, &pool);
            let found = search(&readers, &calibration, &channel_of, bits);
            let options = QuantizeOptions { bits, group_size: GroupSize::Columns(64), ..Default::default() };
            let plain: Vec<DenseMatrix> = readers
                .iter()
                .map(|reader| rtn(reader, None, &options, &pool).unwrap())
                .map(|quantized| DenseMatrix::from_f32(quantized.rows(), columns, quantized.to_f32()))
                .collect();
            assert_eq!(found.unscaled_loss, own_loss(&readers, &plain, &calibration, &pool), "α = 0 is RTN");
            assert!(found.loss < 0.8 * found.unscaled_loss, "{bits}: {} {}", found.loss, found.unscaled_loss);
            assert!(found.alpha > 0.0);
        }
    }

    #[test]
    fn columns_that_read_one_channel_share_its_scale_and_dead_channels_stay_finite() {
        let pool = ThreadPool::with_threads(1);
        let columns = 64;
        let channel_of: Vec<usize> = (0..columns).map(|column| column % 32).collect();
        let readers = [DenseMatrix::from_f32(9, columns, matrices::weights(5, 9, columns))];
        let mut x = matrices::activations(6, 100, columns);
        x.iter_mut().enumerate().filter(|(i, _)| i % 32 == 3).for_each(|(_, value)| *value = 0.0);
        let mut builder = CalibrationBuilder::new(columns);
        builder.push(&x, &pool).unwrap();
        let found = search(&readers, &builder.finish(&pool), &channel_of, 3);
        assert_eq!(found.scales.len(), 32);
        assert!(found.scales.iter().all(|&scale| scale.is_finite() && scale > 0.0));
        assert!(found.loss <= found.unscaled_loss);
    }

    #[test]
    fn widths_that_differ_are_refused() {
        let pool = ThreadPool::with_threads(1);
        let readers = [DenseMatrix::from_f32(2, 4, vec![1.0; 8])];
        let calibration = calibration(1, 5, &pool);
        let storable = |scales| scales;
        let group = ScaleGroup {
            readers: readers.iter().collect(),
            calibration: &calibration,
            channel_of: &[0, 1, 2, 3],
            storable: &storable,
        };
        let error = awq_scales(&group, &QuantizeOptions::default(), &mut |_| Ok(0.0), &pool).unwrap_err();
        assert_eq!(error.code, ErrorCode::ShapeMismatch);
    }
}
