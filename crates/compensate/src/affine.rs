use kintsugi_calibration::Calibration;
use kintsugi_runtime::{Error, ErrorCode, Result, ThreadPool};
use kintsugi_weights::{FactorBias, LowRank, RowSource};

use crate::compensation::{solve, stored_factors, widen};
use crate::residual_error::wide_row;
use crate::{
    Compensation, CompensationOptions, HoldOut, HoldOutProfile, OutputDirections, OutputSquares, RankProfile, Residual,
};

/// Affine EoRA: factors and a bias that minimise `‖(W − Ŵ − B A) X − b 1ᵀ‖`.
///
/// For any factors the best bias is `b = (Δ − B A) μ` with the mean μ of the inputs, and what is left then is the error
/// of the factors on `X − μ 1ᵀ`: so B and A are EoRA in the metric of the centred second moment `S − T μ μᵀ`. Factors
/// without a bias are among those that were chosen from, so the error on the calibration inputs is never above that of
/// EoRA of the same rank. A single input may be made worse: the bias is added whatever it is.
///
/// Errors stay those of the inputs as they are: `‖Δ X‖² = ‖Δ (X − μ 1ᵀ)‖² + T ‖Δ μ‖²`, and the same of W.
pub(crate) fn compensate_affine(
    weight: &dyn RowSource,
    compressed: &dyn RowSource,
    calibration: &Calibration,
    hold_out: Option<&HoldOut>,
    outputs: Option<&OutputSquares>,
    options: &CompensationOptions,
    pool: &ThreadPool,
) -> Result<Compensation> {
    let (mean, centred) = (calibration.mean(), calibration.centred());
    let original = outputs.and_then(|outputs| outputs.accurate(weight, calibration, pool));
    let mut residual = Residual::new(weight, compressed, &centred, original, pool)?;
    let rows = residual.rows();
    let delta_mean: Vec<f64> = residual.delta().chunks_exact(mean.len().max(1)).map(|row| dot(row, &mean)).collect();
    let total = calibration.weight();
    if original.is_none() {
        let mut row = vec![0.0; mean.len()];
        let answers = (0..rows).map(|i| {
            wide_row(weight, i, &mut row);
            dot(&row, &mean).powi(2)
        });
        residual.count_mean(total * answers.sum::<f64>());
    }

    let mut found = solve(&mut residual, weight, None, None, options, pool)?;
    // The energy may have become more exact meanwhile.
    let before = residual.energy() + total * square(&delta_mean);
    if found.factors.is_none() && square(&delta_mean) > 0.0 {
        // Inputs that do not vary, or whose variation is not worth factors: what is left to repair is their mean.
        let directions = OutputDirections::new(&[1.0], unit(&delta_mean), rows, 1, 0.0);
        let factors = stored_factors(&residual, &directions, options.precision, pool)?;
        found.profile.calibration = RankProfile::energies(&residual, &factors, pool);
        found.factors = Some(factors);
    }
    let mut profile = found.profile;
    if let Some(factors) = found.factors.take() {
        let (factors, gaps) = with_bias(factors, &mean, &delta_mean)?;
        for (energy, gap) in profile.calibration[1..].iter_mut().zip(gaps) {
            *energy += total * gap;
        }
        found.factors = (profile.calibration[factors.rank()] < before).then_some(factors);
    }
    if found.factors.is_none() {
        profile.calibration.truncate(1);
    }
    profile.calibration[0] = before;
    let last = profile.best[profile.best.len() - 1];
    profile.best.resize(profile.best.len().max(profile.calibration.len()), last);
    profile.best[0] = before;
    let factors = found.factors;
    profile.hold_out = hold_out.map(|inputs| {
        let mut profile = HoldOutProfile::new(&residual, None, weight, (inputs, outputs), pool);
        if let Some(factors) = &factors {
            let centred = HoldOutProfile::new(&residual, Some(factors), weight, (&inputs.minus(&mean), outputs), pool);
            for (energies, centred) in profile.energies.iter_mut().zip(centred.energies) {
                energies.extend_from_slice(&centred[1..]);
            }
        }
        profile
    });
    let error = profile.error(profile.largest_rank());
    Ok(Compensation { factors, error, certificate: found.certificate, profile })
}

/// Gives factors the bias `(Δ − B A) μ`; beside it, for the ranks 1, 2, …, the squared distance of the bias that is
/// stored for the rank from the exact one.
fn with_bias(factors: LowRank, mean: &[f64], delta_mean: &[f64]) -> Result<(LowRank, Vec<f64>)> {
    let rank = factors.rank();
    let (b, a) = (widen(factors.b()), widen(factors.a()));
    let found: Vec<f64> = a.chunks_exact(mean.len().max(1)).map(|row| dot(row, mean)).collect();
    let exact: Vec<f64> = b.chunks_exact(rank).zip(delta_mean).map(|(row, value)| value - dot(row, &found)).collect();
    let bias = FactorBias {
        values: exact.iter().map(|&value| value as f32).collect(),
        centre: Some(found.iter().map(|&value| value as f32).collect()),
    };
    if !bias.values.iter().chain(bias.centre.iter().flatten()).all(|value| value.is_finite()) {
        let message = "the mean of the inputs asks for a bias that f32 cannot hold";
        return Err(Error::new(ErrorCode::ValueNotFinite, message)
            .subject("eora.affine")
            .hint("Leave eora.affine out"));
    }
    let (mut exact, mut stored) = (exact, widen(&bias.values));
    let centre = widen(bias.centre.as_deref().unwrap_or_default());
    let mut gaps = vec![0.0; rank];
    for r in (0..rank).rev() {
        let gap = exact.iter().zip(&stored).map(|(exact, &stored)| (exact - f64::from(stored as f32)).powi(2));
        gaps[r] = gap.sum();
        // Without direction r.
        for ((row, exact), stored) in b.chunks_exact(rank).zip(&mut exact).zip(&mut stored) {
            *exact += row[r] * found[r];
            *stored += row[r] * centre[r];
        }
    }
    Ok((factors.with_bias(bias), gaps))
}

fn dot(left: &[f64], right: &[f64]) -> f64 {
    left.iter().zip(right).map(|(a, b)| a * b).sum()
}

fn square(values: &[f64]) -> f64 {
    dot(values, values)
}

/// A vector of length one in that direction.
fn unit(values: &[f64]) -> Vec<f64> {
    // Squares of what is tiny would be zero.
    let largest = values.iter().fold(0.0f64, |largest, value| largest.max(value.abs()));
    let scaled: Vec<f64> = values.iter().map(|value| value / largest).collect();
    let norm = square(&scaled).sqrt();
    scaled.into_iter().map(|value| value / norm).collect()
}
