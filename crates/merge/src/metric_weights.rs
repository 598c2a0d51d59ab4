use kintsugi_runtime::{Error, ErrorCode, Result};

/// How weights are made of a figure that each adapter has: a loss, an accuracy, a step.
///
/// The family covers what averaging by metrics (arXiv 2504.18580) is said to do, weights from loss or step with one
/// parameter that sets how much they differ. The formula of that paper is not public, so none of these has its name.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum MetricFormula {
    /// `wᵢ = exp(±mᵢ / temperature) / Σ`, with a minus where lower is better.
    Softmax {
        /// Above 0; large values make the weights equal.
        temperature: f64,
    },
    /// `wᵢ = mᵢ^±power / Σ`, with a minus where lower is better; the metrics must be above 0.
    Proportional {
        /// 0 makes the weights equal.
        power: f64,
    },
}

/// Weights that sum to 1, the larger the better the metric.
///
/// # Errors
/// `ERR_OPTION_INVALID` when there are no metrics, or one is not finite or not in the domain of the formula.
pub fn metric_weights(metrics: &[f64], lower_is_better: bool, formula: MetricFormula) -> Result<Vec<f64>> {
    let invalid =
        |message: &str, hint: &str| Err(Error::new(ErrorCode::OptionInvalid, message).subject("metrics").hint(hint));
    if metrics.is_empty() || !metrics.iter().all(|metric| metric.is_finite()) {
        return invalid("metrics must be finite numbers, one for each adapter", "Give for example the losses");
    }
    let sign = if lower_is_better { -1.0 } else { 1.0 };
    let below_best = |goodness: &dyn Fn(f64) -> f64| -> Vec<f64> {
        let best = metrics.iter().fold(f64::NEG_INFINITY, |best, &metric| best.max(goodness(metric)));
        metrics.iter().map(|&metric| goodness(metric) - best).collect()
    };
    // Logarithms of the weights relative to the best one: none is above 0, and one is 0 however steep the formula is.
    let logarithms: Vec<f64> = match formula {
        MetricFormula::Softmax { temperature } if temperature > 0.0 && temperature.is_finite() => {
            below_best(&|metric| sign * metric).into_iter().map(|below| below / temperature).collect()
        }
        MetricFormula::Softmax { .. } => return invalid("the temperature must be above 0", "Give for example 1"),
        MetricFormula::Proportional { power } if power >= 0.0 && power.is_finite() => {
            if !metrics.iter().all(|&metric| metric > 0.0) {
                return invalid("proportional weights need metrics above 0", "Use softmax for metrics of any sign");
            }
            below_best(&|metric| sign * metric.ln()).into_iter().map(|below| power * below).collect()
        }
        MetricFormula::Proportional { .. } => return invalid("the power must not be negative", "Give for example 1"),
    };
    let shares: Vec<f64> = logarithms.iter().map(|value| value.exp()).collect();
    let total: f64 = shares.iter().sum();
    Ok(shares.iter().map(|share| share / total).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_sum_to_one_and_follow_the_formulas() {
        let softmax = |temperature| MetricFormula::Softmax { temperature };
        let weights = metric_weights(&[1.0, 2.0], false, softmax(1.0)).unwrap();
        assert!((weights[1] / weights[0] - 1.0f64.exp()).abs() < 1e-12);
        let weights = metric_weights(&[1.0, 2.0], true, softmax(0.5)).unwrap();
        assert!((weights[0] / weights[1] - 2.0f64.exp()).abs() < 1e-12);
        let proportional = |power| MetricFormula::Proportional { power };
        assert_eq!(metric_weights(&[1.0, 3.0], false, proportional(1.0)).unwrap(), [0.25, 0.75]);
        assert_eq!(metric_weights(&[1.0, 3.0], true, proportional(1.0)).unwrap(), [0.75, 0.25]);
        assert_eq!(metric_weights(&[5.0, 1e300], true, proportional(0.0)).unwrap(), [0.5, 0.5]);
        assert_eq!(metric_weights(&[2.0, 3.0, 3.0], false, proportional(1e308)).unwrap(), [0.0, 0.5, 0.5]);
        assert_eq!(metric_weights(&[1e-300, 1e300], true, proportional(f64::MAX)).unwrap(), [1.0, 0.0]);
        let extreme = metric_weights(&[1e308, -1e308], false, softmax(1e-3)).unwrap();
        assert_eq!(extreme, [1.0, 0.0]);
    }

    #[test]
    fn what_has_no_weights_is_refused() {
        let softmax = MetricFormula::Softmax { temperature: 1.0 };
        for (metrics, formula) in [
            (vec![], softmax),
            (vec![f64::NAN], softmax),
            (vec![1.0], MetricFormula::Softmax { temperature: 0.0 }),
            (vec![1.0, -1.0], MetricFormula::Proportional { power: 1.0 }),
            (vec![1.0], MetricFormula::Proportional { power: -1.0 }),
        ] {
            assert_eq!(metric_weights(&metrics, true, formula).unwrap_err().code, ErrorCode::OptionInvalid);
        }
    }
}
