use serde::{Deserialize, Serialize};

/// What proves that directions are as good as any: how far their error is above the Eckart–Young bound at most.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Certificate {
    /// Error of the directions before their factors are rounded, `‖(Δ − U Uᵀ Δ) X‖ / ‖W X‖`.
    pub solved: f64,
    /// The bound: no factors of this rank leave less.
    pub bound: f64,
    /// Whether `solved` is within 1e-3 of the bound, up to 1e-7 of the error before.
    pub holds: bool,
}

impl Certificate {
    /// Largest error above the bound, relative to it.
    const ABOVE_BOUND: f64 = 1e-3;
    /// What a solver aims at.
    const AIM: f64 = 1e-4;
    /// Largest error above the bound, relative to what there was to repair: rounding in f64 squares to no less.
    const OF_RESIDUAL: f64 = 1e-7;

    /// Whether directions that capture `captured` of `energy`, and are short of the best by `excess` at most, are what
    /// a solver aims at.
    pub(crate) fn suffices(energy: f64, captured: f64, excess: f64) -> bool {
        let rest = (energy - captured - excess).max(0.0);
        excess <= (2.0 * Self::AIM * rest).max(Self::OF_RESIDUAL * Self::OF_RESIDUAL * energy)
    }

    /// From energies: of the residual, what the directions that will be used were measured to capture, and what the best
    /// ones can capture at most.
    pub(crate) fn new(energy: f64, measured: f64, most: f64, relative: impl Fn(f64) -> f64) -> Self {
        let solved = relative((energy - measured).max(0.0));
        let bound = relative((energy - most).max(0.0));
        let holds = solved <= bound * (1.0 + Self::ABOVE_BOUND) + Self::OF_RESIDUAL * relative(energy);
        Certificate { solved, bound, holds }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_solver_aims_at_holds_and_much_less_does_not() {
        for (energy, captured) in [(1.0, 0.3), (1.0, 0.999), (1e12, 1e12 * (1.0 - 1e-9)), (1e-30, 0.0), (5.0, 5.0)] {
            for share in [0.0, 1e-15, 1e-9, 1e-5, 1e-4, 1e-2, 0.5] {
                let excess = share * (energy - captured);
                let certificate = Certificate::new(energy, captured, captured + excess, f64::sqrt);
                assert!(!Certificate::suffices(energy, captured, excess) || certificate.holds, "{energy} {share}");
                assert!(share < 1e-2 || energy - captured < 1e-10 * energy || !certificate.holds, "{energy} {share}");
            }
        }
    }
}
