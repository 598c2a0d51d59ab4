use kintsugi_runtime::{Result, ThreadPool};

use crate::fast::leading;
use crate::input_metric::InputMetric;
use crate::{CompensationMethod, OutputDirections, Residual};

/// Channels are taken for uncorrelated: for so few calibration tokens that correlations would be chance.
///
/// Channel j counts `sⱼ^2α` with `s = diag(S)`, and α is the one of 1/2, 1/4 and 0 whose directions leave the least of
/// `‖Δ X‖` on the calibration inputs, at the rank that is solved; of equals the first. α = 1/2 is QERA-approx (arXiv
/// 2410.06040), α = 0 is [`Lorc`](crate::Lorc). Where feedback of errors (GPTQ) has left errors that cancel over correlated
/// channels, a smaller exponent is often the better one: sizes of channels take such errors for large. AWQ and ASVD search
/// exponents of their scales like this. S itself only chooses between three bases, so chance in it has little to say.
pub struct Diagonal;

impl CompensationMethod for Diagonal {
    fn name(&self) -> &'static str {
        "diagonal"
    }

    fn is_optimal(&self) -> bool {
        false
    }

    fn directions(&self, residual: &Residual<'_>, rank: usize, pool: &ThreadPool) -> Result<OutputDirections> {
        let energies = residual.calibration().energies();
        // A root instead of a power: it is the same number on every machine.
        let roots = energies.iter().map(|energy| energy.max(0.0).sqrt()).collect();
        let inputs = InputMetric::SecondMoment(residual.calibration().second_moment());
        let found = |metric: InputMetric<'_>| -> Result<(f64, OutputDirections)> {
            let energy = metric.energy_by_channels(residual.delta(), residual.columns(), pool);
            let directions = leading(residual, &metric, energy, rank, pool)?;
            Ok((directions.measured(residual, &inputs, pool), directions))
        };
        let (mut most, mut best) = found(InputMetric::Energies(energies))?;
        for metric in [InputMetric::Energies(roots), InputMetric::Identity] {
            let (captured, directions) = found(metric)?;
            if captured > most {
                (most, best) = (captured, directions);
            }
        }
        Ok(best)
    }
}
