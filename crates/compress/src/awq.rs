use kintsugi_calibration::Calibration;
use kintsugi_linalg::quadratic_trace_of;
use kintsugi_runtime::{Error, ErrorCode, Result, ThreadPool};
use kintsugi_weights::DenseMatrix;

use crate::rtn::rtn_scaled;
use crate::{BlockLoss, BlockMethod, Clip, GroupScales, QuantizeOptions, ScaleGroup};

/// Exponents are `k / ALPHAS`, `k = 0 … ALPHAS`: even k first, then those beside the best of them.
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
/// `√(max s · min s)`, for α in `0, 0.1, …, 1` and then 0.05 to either side of the best of these. Each is judged by the
/// loss of the block with `Q(W diag s) diag s⁻¹` for the readers, Q being [`crate::rtn`] with `options`. α = 0 is the
/// unscaled weight, so the loss that is found never exceeds that of the same rounding without scales.
///
/// Two things are other than published (`bench/awq.md`). That search rounds without clipping and clips what it has found;
/// but what clipping repairs, scaling need not pay for, and with ranges that shrink the best exponents are smaller. And
/// the loss of a block lets one reader pay for another, so a candidate with which any reader has a larger error in its own
/// outputs than after rounding to nearest without clipping gives way to the next one, the unscaled weight at last.
///
/// # Errors
/// Those of [`crate::rtn`] and of `loss`; `ERR_SHAPE_MISMATCH` when weights, statistics and channels do not fit together.
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
    let round = |scales: &[f32], options: &QuantizeOptions| -> Result<Vec<DenseMatrix>> {
        let factors: Vec<f32> = group.channel_of.iter().map(|&channel| scales[channel]).collect();
        let rounded = group.readers.iter().map(|reader| {
            let scaled = scale_columns(reader, |column| factors[column]);
            let quantized = rtn_scaled(&scaled, group.calibration, &factors, options, pool)?;
            let dense = DenseMatrix::from_f32(reader.rows(), columns, quantized.to_f32());
            Ok(scale_columns(&dense, |column| 1.0 / factors[column]))
        });
        rounded.collect()
    };
    let errors = |rounded: &[DenseMatrix]| -> Vec<f64> {
        let pairs = group.readers.iter().zip(rounded);
        pairs.map(|(reader, rounded)| output_error(reader, rounded, group.calibration, pool)).collect()
    };

    let mut found: Vec<(usize, GroupScales)> = Vec::new();
    for beside_the_best in [false, true] {
        let steps: Vec<usize> = match (beside_the_best, found.first()) {
            (true, Some(&(0, _))) => vec![1],
            (true, Some(&(best, _))) => (best - 1..=(best + 1).min(ALPHAS)).step_by(2).collect(),
            _ => (0..=ALPHAS).step_by(2).collect(),
        };
        for step in steps {
            let alpha = step as f64 / ALPHAS as f64;
            let scales = (group.storable)(candidate(&activations, alpha));
            let loss = loss(&round(&scales, options)?)?;
            found.push((step, GroupScales { scales, alpha, loss, unscaled_loss: f64::NAN }));
        }
        found.sort_by(|(_, a), (_, b)| a.loss.total_cmp(&b.loss));
    }
    let unscaled = found.iter().find(|&&(step, _)| step == 0);
    let unscaled_loss = unscaled.map_or(f64::NAN, |(_, unscaled)| unscaled.loss);

    let plain = QuantizeOptions { clip: Clip::Never, ..options.clone() };
    let limits = errors(&round(&vec![1.0; channels], &plain)?);
    for (step, best) in found {
        let pays = step > 0 && errors(&round(&best.scales, options)?).iter().zip(&limits).any(|(a, b)| a > b);
        if !pays {
            return Ok(GroupScales { unscaled_loss, ..best });
        }
    }
    Err(Error::new(ErrorCode::Internal, "no scale was tried"))
}

/// `‖(W − Ŵ) X‖²`.
fn output_error(weight: &DenseMatrix, rounded: &DenseMatrix, calibration: &Calibration, pool: &ThreadPool) -> f64 {
    let columns = weight.columns();
    let fill = |row: usize, out: &mut [f64]| {
        let (mut before, mut after) = (vec![0.0; columns], vec![0.0; columns]);
        weight.row_to_f32(row, &mut before);
        rounded.row_to_f32(row, &mut after);
        let pairs = before.iter().zip(&after);
        out.iter_mut().zip(pairs).for_each(|(out, (before, after))| *out = f64::from(*before) - f64::from(*after));
    };
    quadratic_trace_of(weight.rows(), fill, calibration.second_moment(), pool)
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
    use kintsugi_testkit::{Random, matrices};
    use kintsugi_weights::GroupSize;

    use super::*;
    use crate::rtn;

    fn calibration(seed: u64, columns: usize, pool: &ThreadPool) -> Calibration {
        let mut builder = CalibrationBuilder::new(columns);
        builder.push(&matrices::activations(seed, 400, columns), pool).unwrap();
        builder.finish(pool)
    }

    /// Over all readers.
    fn own_loss(readers: &[DenseMatrix], rounded: &[DenseMatrix], calibration: &Calibration, pool: &ThreadPool) -> f64 {
        readers.iter().zip(rounded).map(|(reader, rounded)| output_error(reader, rounded, calibration, pool)).sum()
    }

    fn search(
        readers: &[DenseMatrix],
        calibration: &Calibration,
        channel_of: &[usize],
        options: &QuantizeOptions,
    ) -> GroupScales {
        let pool = ThreadPool::with_threads(2);
        let storable = |scales| scales;
        let group = ScaleGroup { readers: readers.iter().collect(), calibration, channel_of, storable: &storable };
        awq_scales(&group, options, &mut |rounded| Ok(own_loss(readers, rounded, calibration, &pool)), &pool).unwrap()
    }

    #[test]
    fn the_loss_never_exceeds_that_of_rounding_to_nearest_and_falls_with_outliers() {
        let pool = ThreadPool::with_threads(2);
        let columns = 148;
        let channel_of: Vec<usize> = (0..columns).collect();
        let cases = [2, 3, 4, 5, 6, 8].into_iter().flat_map(|bits| [(bits, Clip::Never), (bits, Clip::Outputs)]);
        for (bits, clip) in cases {
            let readers: Vec<DenseMatrix> = [(1, 30), (2, 17)]
                .map(|(seed, rows)| DenseMatrix::from_f32(rows, columns, matrices::weights(seed, rows, columns)))
                .into();
            let calibration = calibration(3, columns, &pool);
            let options = QuantizeOptions { bits, group_size: GroupSize::Columns(64), clip, ..Default::default() };
            let found = search(&readers, &calibration, &channel_of, &options);
            let plain: Vec<DenseMatrix> = readers
                .iter()
                .map(|reader| rtn(reader, Some(&calibration), &options, &pool).unwrap())
                .map(|quantized| DenseMatrix::from_f32(quantized.rows(), columns, quantized.to_f32()))
                .collect();
            assert_eq!(found.unscaled_loss, own_loss(&readers, &plain, &calibration, &pool), "α = 0 is RTN");
            assert!(found.loss < 0.8 * found.unscaled_loss, "{bits} {clip:?}: {} {}", found.loss, found.unscaled_loss);
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
        let options = QuantizeOptions { bits: 3, group_size: GroupSize::Columns(64), ..Default::default() };
        let found = search(&readers, &builder.finish(&pool), &channel_of, &options);
        assert_eq!(found.scales.len(), 32);
        assert!(found.scales.iter().all(|&scale| scale.is_finite() && scale > 0.0));
        assert!(found.loss <= found.unscaled_loss);
    }

    #[test]
    fn no_reader_pays_for_another() {
        let pool = ThreadPool::with_threads(2);
        let (rows, columns) = (16, 128);
        let mut random = Random::new(8);
        let sizes = (0..400 * columns).map(|i| if i % 8 == 0 { 6.0 } else { 1.0 });
        let x: Vec<f32> = sizes.map(|size| (size * random.normal()) as f32).collect();
        let mut builder = CalibrationBuilder::new(columns);
        builder.push(&x, &pool).unwrap();
        let calibration = builder.finish(&pool);
        // Magnified, the strong channels of the first reader stay within its ranges, and widen those of the second.
        let readers = [0.05, 2.0].map(|strong| {
            let sizes = (0..rows * columns).map(|i| if i % 8 == 0 { strong } else { 1.0 });
            DenseMatrix::from_f32(rows, columns, sizes.map(|size| (size * random.normal()) as f32).collect())
        });
        let options = QuantizeOptions { bits: 3, group_size: GroupSize::Columns(64), ..Default::default() };
        let storable = |scales| scales;
        let channel_of: Vec<usize> = (0..columns).collect();
        let group = ScaleGroup {
            readers: readers.iter().collect(),
            calibration: &calibration,
            channel_of: &channel_of,
            storable: &storable,
        };
        // The block hears the first reader alone.
        let mut heard = Vec::new();
        let mut loss = |rounded: &[DenseMatrix]| {
            heard.push([0, 1].map(|at| output_error(&readers[at], &rounded[at], &calibration, &pool)));
            Ok(heard[heard.len() - 1][0])
        };
        let found = awq_scales(&group, &options, &mut loss, &pool).unwrap();
        let unscaled = heard[0];
        let least = heard.iter().min_by(|a, b| a[0].total_cmp(&b[0])).unwrap();
        assert!(least[0] < found.loss && least[1] > 1.5 * unscaled[1], "the second would pay: {heard:?}");
        let chosen = heard.iter().find(|errors| errors[0] == found.loss).unwrap();
        assert!(chosen[0] <= unscaled[0] && chosen[1] <= unscaled[1], "{chosen:?} {unscaled:?}");
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
