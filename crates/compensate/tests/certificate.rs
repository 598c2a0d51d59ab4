//! What a certificate is about.

use kintsugi_compensate::{CompensationMethod, CompensationOptions, Exact, Fast, OutputDirections, Residual};
use kintsugi_runtime::{Result, ThreadPool};
use kintsugi_testkit::eora_cases::{EORA_CASES, ITERATED_EORA_CASES};
use kintsugi_weights::ElementType;

use crate::common::{Solvable, options};

/// Says that it finds the best directions, and gives others.
struct Liar;

impl CompensationMethod for Liar {
    fn name(&self) -> &'static str {
        "liar"
    }

    fn is_optimal(&self) -> bool {
        true
    }

    fn directions(&self, residual: &Residual<'_>, rank: usize, pool: &ThreadPool) -> Result<OutputDirections> {
        let mut found = Fast.directions(residual, rank, pool)?;
        // The first two mixed up with the wrong sign: no longer orthogonal to each other.
        let rows = residual.rows();
        for row in 0..rows {
            found.vectors[rows + row] = 0.8 * found.vectors[rows + row] - 0.6 * found.vectors[row];
        }
        Ok(found)
    }
}

#[test]
fn a_certificate_is_about_the_directions_and_not_about_what_is_said_of_them() {
    for case in [&ITERATED_EORA_CASES[0], &ITERATED_EORA_CASES[10], &EORA_CASES[2]] {
        let problem = Solvable::new(case);
        let rank = case.rank.max(2);
        let solve = |method: &'static dyn CompensationMethod| {
            problem.solve(&CompensationOptions { method, ..options(rank, ElementType::F32) }).certificate.unwrap()
        };
        assert!(solve(&Fast).holds && solve(&Exact).holds);
        assert!(!solve(&Liar).holds, "{case:?}");
    }
}
