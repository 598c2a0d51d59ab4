use kintsugi_compress::scale_columns;
use kintsugi_model::{BlockWeights, DecoderSpec, FoldSource, NormWeight, ScaleFold};
use kintsugi_runtime::Result;
use kintsugi_weights::{DenseMatrix, LinearWeight, WeightMatrix};

/// Spread of the logarithms of row scales below which rounding explains them.
const NOISE: f64 = 0.05;

/// The original weights of a block in the form that its compressed ones have: where the latter were made of scaled
/// weights (AWQ, SmoothQuant), with those scales, so that both differ by what rounding took alone.
///
/// A scale that went into a norm is the quotient of both norms. One that went into the rows of a Linear is read off
/// them, row by row, and need not be exact: the original computes the same with any scales, as long as both sides of
/// a fold have them.
///
/// # Errors
/// What scaling reports.
pub(crate) fn as_compressed(
    spec: &DecoderSpec,
    original: BlockWeights,
    compressed: &BlockWeights,
) -> Result<AsCompressed> {
    let mut linears = original.linears;
    let mut scaled = false;
    for fold in spec.family.folds {
        let channel_of = fold.channel_of(spec);
        let found = match fold.source {
            FoldSource::AttentionNorm => norm_scales(&original.attention_norm, &compressed.attention_norm),
            FoldSource::MlpNorm => norm_scales(&original.mlp_norm, &compressed.mlp_norm),
            FoldSource::Rows(slot) => spec.place_of(slot).and_then(|place| {
                let channels = channel_of.iter().max().map_or(0, |&last| last + 1);
                let scales = row_scales(&linears[place], &compressed.linears[place], channels)?;
                let readers = fold.places(spec).map(|place| (&linears[place], &compressed.linears[place]));
                are_in_columns(&scales, readers, &channel_of).then_some(scales)
            }),
        };
        if let Some(scales) = found {
            scaled = true;
            fold_into(&mut linears, spec, fold, &channel_of, &scales)?;
        }
    }
    // What is not a Linear is what is deployed.
    let weights = BlockWeights {
        linears,
        attention_norm: compressed.attention_norm.clone(),
        mlp_norm: compressed.mlp_norm.clone(),
        head_norms: compressed.head_norms.clone(),
        branch_norms: compressed.branch_norms.clone(),
        router: compressed.router.clone(),
        shared_gate: compressed.shared_gate.clone(),
    };
    Ok(AsCompressed { weights, scaled })
}

/// An original block in the form of its compressed one.
pub(crate) struct AsCompressed {
    pub(crate) weights: BlockWeights,
    /// Whether scales were found: the inputs of some Linears are then others than in the original.
    pub(crate) scaled: bool,
}

/// Whether the columns of what reads the rows have been multiplied by what the rows were divided by: pruning shrinks rows
/// by different factors, too, and leaves the columns behind them alone.
fn are_in_columns<'a>(
    scales: &[f32],
    readers: impl Iterator<Item = (&'a LinearWeight, &'a LinearWeight)>,
    channel_of: &[usize],
) -> bool {
    let (mut own, mut both) = (vec![0.0f64; scales.len()], vec![0.0f64; scales.len()]);
    for (original, compressed) in readers {
        let columns = original.matrix.columns();
        let (mut before, mut after) = (vec![0.0f32; columns], vec![0.0f32; columns]);
        for row in 0..original.matrix.rows() {
            original.matrix.row_to_f32(row, &mut before);
            compressed.matrix.row_to_f32(row, &mut after);
            for (column, (&before, &after)) in before.iter().zip(&after).enumerate() {
                own[channel_of[column]] += f64::from(before) * f64::from(before);
                both[channel_of[column]] += f64::from(before) * f64::from(after);
            }
        }
    }
    let pairs: Vec<(f64, f64)> = scales
        .iter()
        .zip(both.iter().zip(&own))
        .map(|(&scale, (both, own))| (f64::from(scale).ln(), (both / own).ln()))
        .filter(|(rows, columns)| rows.is_finite() && columns.is_finite())
        .collect();
    let count = pairs.len().max(1) as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| pairs.iter().map(of).sum::<f64>() / count;
    let (rows, columns) = (mean(|pair| pair.0), mean(|pair| pair.1));
    let variance: f64 = pairs.iter().map(|pair| (pair.0 - rows).powi(2)).sum();
    let covariance: f64 = pairs.iter().map(|pair| (pair.0 - rows) * (pair.1 - columns)).sum();
    covariance > 0.5 * variance
}

fn fold_into(
    linears: &mut [LinearWeight],
    spec: &DecoderSpec,
    fold: &ScaleFold,
    channel_of: &[usize],
    scales: &[f32],
) -> Result<()> {
    for place in fold.places(spec) {
        if let WeightMatrix::Dense(matrix) = &linears[place].matrix {
            let scaled = scale_columns(matrix, |column| scales[channel_of[column]]);
            linears[place].matrix = WeightMatrix::Dense(scaled);
        }
    }
    let FoldSource::Rows(slot) = fold.source else { return Ok(()) };
    let Some(place) = spec.place_of(slot) else { return Ok(()) };
    let linear = &mut linears[place];
    let (rows, columns) = (linear.matrix.rows(), linear.matrix.columns());
    let first = rows - scales.len();
    let mut values = linear.matrix.to_f32();
    for (row, scale) in values[first * columns..].chunks_exact_mut(columns).zip(scales) {
        row.iter_mut().for_each(|value| *value /= scale);
    }
    linear.matrix = WeightMatrix::Dense(DenseMatrix::from_f32(rows, columns, values));
    if let Some(bias) = &mut linear.bias {
        bias[first..].iter_mut().zip(scales).for_each(|(value, scale)| *value /= scale);
    }
    Ok(())
}

/// What each channel of a norm was divided by; `None` when nothing was.
fn norm_scales(original: &NormWeight, compressed: &NormWeight) -> Option<Vec<f32>> {
    let weights = |norm: &NormWeight| match norm {
        NormWeight::Rms(weight) | NormWeight::Layer { weight, .. } => weight.clone(),
    };
    let (before, after) = (weights(original), weights(compressed));
    let scale = |(&before, &after): (&f32, &f32)| {
        let quotient = before / after;
        if before != 0.0 && quotient.is_finite() && quotient != 0.0 { quotient } else { 1.0 }
    };
    (before != after).then(|| before.iter().zip(&after).map(scale).collect())
}

/// What each of the last `channels` rows of a Linear was divided by; `None` where rounding explains it: rows that were
/// scaled were so by different factors.
fn row_scales(original: &LinearWeight, compressed: &LinearWeight, channels: usize) -> Option<Vec<f32>> {
    let (rows, columns) = (original.matrix.rows(), original.matrix.columns());
    let (mut before, mut after) = (vec![0.0f32; columns], vec![0.0f32; columns]);
    let mut quotients = Vec::with_capacity(channels);
    for row in rows - channels..rows {
        original.matrix.row_to_f32(row, &mut before);
        compressed.matrix.row_to_f32(row, &mut after);
        let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum::<f64>();
        let quotient = dot(&before, &before) / dot(&before, &after);
        quotients.push(if quotient.is_finite() && quotient > 0.0 { quotient } else { f64::NAN });
    }
    let mut sorted: Vec<f64> = quotients.iter().copied().filter(|quotient| quotient.is_finite()).collect();
    sorted.sort_by(f64::total_cmp);
    let middle = *sorted.get(sorted.len() / 2)?;
    let spread = sorted.iter().map(|quotient| (quotient / middle).ln().powi(2)).sum::<f64>() / sorted.len() as f64;
    let scale = |quotient: f64| if quotient.is_finite() { quotient as f32 } else { 1.0 };
    (spread.sqrt() > NOISE).then(|| quotients.into_iter().map(scale).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn linear(rows: usize, columns: usize, value: impl Fn(usize, usize) -> f32) -> LinearWeight {
        let values = (0..rows * columns).map(|at| value(at / columns, at % columns)).collect();
        LinearWeight::plain(WeightMatrix::Dense(DenseMatrix::from_f32(rows, columns, values)))
    }

    #[test]
    fn the_scales_of_rows_are_found_through_rounding_and_rounding_alone_is_not_taken_for_them() {
        let value = |row: usize, column: usize| ((row * 37 + column * 11) as f32 * 0.7).sin();
        let scale = |row: usize| 0.5 + (row % 7) as f32 * 0.25;
        let original = linear(20, 64, value);
        let round = |value: f32| (value * 4.0).round() / 4.0;
        let scaled = linear(20, 64, |row, column| round(value(row, column) / scale(row)));
        let found = row_scales(&original, &scaled, 16).unwrap();
        for (row, found_here) in (4..20).zip(&found) {
            assert!((found_here / scale(row) - 1.0).abs() < 0.1, "row {row}: {found_here} {}", scale(row));
        }
        assert_eq!(row_scales(&original, &linear(20, 64, |r, c| round(value(r, c))), 16), None);
        assert_eq!(row_scales(&original, &linear(20, 64, |r, c| 0.8 * value(r, c)), 16), None, "a factor of all rows");
    }

    #[test]
    fn rows_that_pruning_has_shrunk_were_not_scaled() {
        let value =
            |row: usize, column: usize| ((row * 37 + column * 11) as f32 * 0.7).sin() * (1.0 + (row % 5) as f32);
        let pruned = |row: usize, column: usize| if value(row, column).abs() < 2.0 { 0.0 } else { value(row, column) };
        let (rows, readers) = (linear(32, 96, value), linear(24, 32, |row, column| value(column, row)));
        let scales = row_scales(&rows, &linear(32, 96, pruned), 32).unwrap();
        let channels: Vec<usize> = (0..32).collect();
        let pruned_readers = linear(24, 32, |row, column| {
            let kept = value(column, row);
            if (row + column) % 3 == 0 { 0.0 } else { kept }
        });
        assert!(!are_in_columns(&scales, [(&readers, &pruned_readers)].into_iter(), &channels));
        let scaled_readers = linear(24, 32, |row, column| value(column, row) * scales[column] * 0.95);
        assert!(are_in_columns(&scales, [(&readers, &scaled_readers)].into_iter(), &channels));
    }

    #[test]
    fn channels_that_a_norm_silences_keep_their_weights() {
        let norm = |values: &[f32]| NormWeight::Rms(values.to_vec());
        assert_eq!(norm_scales(&norm(&[1.0, 2.0]), &norm(&[1.0, 2.0])), None);
        let found = norm_scales(&norm(&[1.0, 2.0, 0.0, 3.0]), &norm(&[2.0, 0.5, 5.0, 0.0]));
        assert_eq!(found, Some(vec![0.5, 4.0, 1.0, 1.0]));
    }
}
