use kintsugi_calibration::{Calibration, Drift};
use kintsugi_linalg::{MatrixView, MatrixViewMut, UpperCholesky, add_product};
use kintsugi_runtime::{Error, ErrorCode, Result, ThreadPool};
use kintsugi_weights::RowSource;

use crate::compensation::solve;
use crate::dense_profile::DenseOutputs;
use crate::residual::lost;
use crate::residual_error::wide_row;
use crate::{Compensation, CompensationOptions, HoldOut, OutputSquares, Residual};

/// The inputs of a Linear in both models: x̂, what it reads where it is deployed, behind blocks that are compressed, and
/// x, what the original reads for the same tokens.
#[derive(Clone, Copy, Debug)]
pub struct MixedInputs<'a> {
    /// Of x̂.
    pub deployed: &'a Calibration,
    /// Of `d = x − x̂`.
    pub drift: &'a Drift,
    /// α: how much of the drift is to be corrected, 0 to 1.
    pub share: f64,
    /// x̂ and d of tokens that take no part in the solution.
    pub hold_out: Option<(&'a HoldOut, &'a HoldOut)>,
}

impl MixedInputs<'_> {
    /// λ: how much of the energy of every channel is added to it before the drift is predicted from the inputs. Less lets
    /// directions that hold hardly any input carry corrections that are chance.
    const SHRINKAGE: f64 = 1e-2;
    /// Rows of a product that one task computes.
    const BAND: usize = 64;

    fn check(&self) -> Result<()> {
        let (width, given) = (self.deployed.width(), self.drift.width());
        let alike = |(x, d): (&HoldOut, &HoldOut)| (x.width(), x.tokens()) == (d.width(), d.tokens());
        if width != given || !self.hold_out.is_none_or(alike) {
            let message = format!("statistics of {width} inputs do not belong to a drift of {given}");
            return Err(Error::new(ErrorCode::ShapeMismatch, message).subject("eora"));
        }
        check_share(self.share)
    }

    /// `W D`, `[rows, width]` row-major.
    fn drifted(&self, weight: &dyn RowSource, pool: &ThreadPool) -> Vec<f64> {
        let width = self.drift.width();
        let cross = MatrixView::new(self.drift.cross(), width, width);
        let mut out = vec![0.0; weight.rows() * width];
        pool.for_each_chunk(&mut out, Self::BAND * width.max(1), |index, band| {
            let rows = band.len() / width;
            let mut own = vec![0.0; band.len()];
            own.chunks_exact_mut(width).enumerate().for_each(|(i, row)| wide_row(weight, index * Self::BAND + i, row));
            add_product(MatrixViewMut::new(band, rows, width), MatrixView::new(&own, rows, width), cross);
        });
        out
    }

    /// `X (S + λ diag S)⁻¹` of a row-major `[rows, width]` matrix. Channels are first scaled to the same energy, so that
    /// scales that were folded into them change nothing; dead ones keep their zeros, and have λ alone.
    fn regress(&self, mut x: Vec<f64>, pool: &ThreadPool) -> Result<Vec<f64>> {
        let (width, second_moment) = (self.deployed.width(), self.deployed.second_moment());
        let inverse = |energy: f64| if energy > 0.0 { 1.0 / energy.sqrt() } else { 1.0 };
        let scales: Vec<f64> = self.deployed.energies().into_iter().map(inverse).collect();
        let fill = |i: usize, row: &mut [f64]| {
            let values = second_moment.row(i).iter().zip(&scales[i..]);
            row.iter_mut().zip(values).for_each(|(out, (value, scale))| *out = value * scale * scales[i]);
        };
        let rescale = |x: &mut [f64]| {
            pool.for_each_chunk(x, width, |_, row| row.iter_mut().zip(&scales).for_each(|(x, scale)| *x *= scale));
        };
        rescale(&mut x);
        UpperCholesky::new(width, Self::SHRINKAGE, fill, pool)?.solve_rows(&mut x, pool);
        rescale(&mut x);
        Ok(x)
    }
}

/// Refuses a share of the drift that is none.
///
/// # Errors
/// `ERR_OPTION_INVALID`.
pub fn check_share(share: f64) -> Result<()> {
    if (0.0..=1.0).contains(&share) {
        return Ok(());
    }
    Err(Error::new(ErrorCode::OptionInvalid, format!("{share} is no share of a mismatch"))
        .subject("eora.mismatch")
        .hint("Use a number from 0 (correct none of it) to 1 (all of it), such as 0.5"))
}

/// EoRA towards what the dense model puts out: factors of rank r that minimise `‖W x_α − (Ŵ + B A) x̂‖` over the tokens,
/// with `x_α = x̂ + α (x − x̂)`: for α = 1 the outputs of the dense model on its own inputs.
///
/// With `S = Σ x̂ x̂ᵀ` and `D = Σ (x − x̂) x̂ᵀ` the best matrix of any rank in place of B A is `Δ_α = Δ + α W D S⁺`, and what
/// another one leaves is `‖(Δ_α − B A) X̂‖²` more than what that leaves. So this is reduced-rank regression, and solved
/// as EoRA is, with Δ_α for Δ: methods, certificates, rounding and nested ranks are the same. D S⁺ predicts the drift of
/// a token from what it is; it is taken with shrinkage, `D (S + λ diag S)⁻¹`, so that dead channels and fewer tokens than
/// channels do no harm. CoreQ (arXiv 2602.05902) finds that all of the correction follows chance in the calibration,
/// which is what α is for.
///
/// [`Compensation::error`], the profile and what is held out tell the errors of the target, `‖(Δ_α − B A) X̂‖ / ‖W X̂‖`. No
/// input is made worse in that sense: `‖(Δ_α − B A) x‖ ≤ ‖Δ_α x‖` holds for every x, and `‖(Δ − B A) x‖ ≤ ‖Δ x‖` does not.
/// [`RankProfile::dense`](crate::RankProfile::dense) tells the errors against the outputs of the dense model. With α = 0,
/// and where no token has drifted, the factors are those of [`compensate`](crate::compensate), bit for bit. `known` are
/// squares of the outputs of W on x̂, as there.
///
/// # Errors
/// As [`compensate`](crate::compensate), and `ERR_OPTION_INVALID` for an α outside of 0 to 1, or a bias, which is solved
/// for the mean of one kind of inputs.
pub fn compensate_mixed(
    weight: &dyn RowSource,
    compressed: &dyn RowSource,
    inputs: &MixedInputs<'_>,
    known: Option<&OutputSquares>,
    options: &CompensationOptions,
    pool: &ThreadPool,
) -> Result<Compensation> {
    inputs.check()?;
    if options.affine {
        let message = "a bias is solved for the mean of one kind of inputs, and mixed inputs are two";
        return Err(Error::new(ErrorCode::OptionInvalid, message)
            .subject("eora.affine")
            .hint("Leave it out, or solve for deployed or dense inputs"));
    }
    let mut target = lost(weight, compressed, inputs.deployed, pool)?;
    let outputs = if inputs.drift.is_zero() {
        DenseOutputs::without_drift(weight, &target, inputs, pool)
    } else {
        let drifted = inputs.drifted(weight, pool);
        let outputs = DenseOutputs::new(weight, &target, &drifted, inputs, pool);
        if inputs.share > 0.0 {
            let correction = inputs.regress(drifted, pool)?;
            target.iter_mut().zip(&correction).for_each(|(value, change)| *value += inputs.share * change);
        }
        outputs
    };
    if target.iter().any(|value| !value.is_finite()) {
        return Err(Error::new(ErrorCode::SolverFailed, "the drift of the inputs cannot be predicted from them")
            .subject("eora.mismatch")
            .hint("Calibrate with more tokens, or solve for deployed inputs"));
    }
    let original = known.and_then(|known| known.accurate(weight, inputs.deployed, pool));
    let mut residual = Residual::of(target, weight, inputs.deployed, original, pool);
    let mut solved = solve(&mut residual, weight, inputs.hold_out.map(|(x, _)| x), known, options, pool)?;
    solved.profile.dense = Some(outputs.profile(weight, compressed, inputs, solved.factors.as_ref(), pool)?);
    Ok(solved)
}

/// Bytes that solving for mixed inputs takes beside what [`Residual::bytes`] counts: `W D`, or Δ and W for the errors in
/// the end, in f64, and the factor of S.
pub fn mixed_bytes(rows: usize, columns: usize) -> u64 {
    let values = rows as u64 * columns as u64;
    16 * values + kintsugi_linalg::UpperTriangle::<f64>::bytes(columns)
}
