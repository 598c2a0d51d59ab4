use kintsugi_linalg::{MatrixView, product_by_columns, times_symmetric_by_columns, transposed};
use kintsugi_runtime::ThreadPool;
use kintsugi_weights::{LowRank, RowSource};
use serde::{Deserialize, Serialize};

use crate::compensation::widen;
use crate::residual::relative;
use crate::{DenseError, DenseProfile, HoldOut, OutputSquares, Residual, ResidualError};

/// What each prefix of the stored factors leaves of the residual: energies `‖(Δ − B_r A_r) X‖²` for the ranks
/// 0, 1, …, as many as there are and one more.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RankProfile {
    /// `‖W X‖²` on the calibration inputs.
    pub original: f64,
    /// On the calibration inputs.
    pub calibration: Vec<f64>,
    /// What no factors of that rank go below; at least as many.
    pub best: Vec<f64>,
    /// On inputs that took no part.
    pub hold_out: Option<HoldOutProfile>,
    /// Against the outputs of the dense model on its own inputs, where those are known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dense: Option<DenseProfile>,
}

/// A profile on inputs that took no part, in two parts: what is decided by one is reported from the other.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HoldOutProfile {
    /// Inputs of the part that is reported.
    pub tokens: usize,
    /// `‖W X‖²` of both parts.
    pub original: [f64; 2],
    /// For decisions, and for reports.
    pub energies: [Vec<f64>; 2],
}

/// Errors on inputs that took no part, relative as in [`ResidualError`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct HoldOutError {
    /// Number of inputs.
    pub tokens: usize,
    /// Without compensation.
    pub quantized: f64,
    /// With it.
    pub compensated: f64,
}

impl RankProfile {
    /// The rank of all factors.
    pub fn largest_rank(&self) -> usize {
        self.calibration.len().saturating_sub(1)
    }

    /// The errors with the first `rank` directions, as many as there are.
    ///
    /// # Panics
    /// When the profile is empty.
    pub fn error(&self, rank: usize) -> ResidualError {
        let rank = rank.min(self.largest_rank());
        let of = |energy: f64| relative(energy, self.original);
        let compensated = of(self.calibration[rank]);
        // Where factors are not worth their rounding the bound of what was tried stands.
        let bound = if self.largest_rank() == 0 { self.best.last() } else { self.best.get(rank) };
        let bound = bound.map_or(compensated, |&bound| of(bound)).min(compensated);
        ResidualError { quantized: of(self.calibration[0]), compensated, bound }
    }

    /// The same on inputs that took no part.
    pub fn hold_out_error(&self, rank: usize) -> Option<HoldOutError> {
        let profile = self.hold_out.as_ref()?;
        let of = |rank: usize| {
            let energies = &profile.energies[1];
            relative(energies[rank.min(energies.len() - 1)], profile.original[1])
        };
        Some(HoldOutError { tokens: profile.tokens, quantized: of(0), compensated: of(rank) })
    }

    /// The errors against the outputs of the dense model.
    pub fn dense_error(&self, rank: usize) -> Option<DenseError> {
        self.dense.as_ref().map(|profile| profile.error(rank))
    }

    /// Whether it says something about rank 0 at least, of all inputs that it speaks of.
    pub fn is_sound(&self) -> bool {
        let held = self.hold_out.iter().flat_map(|profile| &profile.energies);
        let sound = self.dense.as_ref().is_none_or(DenseProfile::is_sound);
        sound && [&self.calibration, &self.best].into_iter().chain(held).all(|energies| !energies.is_empty())
    }

    /// On the calibration inputs.
    pub(crate) fn energies(residual: &Residual<'_>, factors: &LowRank, pool: &ThreadPool) -> Vec<f64> {
        let (rows, columns, rank) = (residual.rows(), residual.columns(), factors.rank());
        let (b, a) = (widen(factors.b()), widen(factors.a()));
        let directions = transposed(&b, rows, rank);
        let directions = MatrixView::new(&directions, rank, rows);
        let found = product_by_columns(directions, MatrixView::new(residual.delta(), rows, columns), pool);
        let a = MatrixView::new(&a, rank, columns);
        let weighted = times_symmetric_by_columns(a, residual.calibration().second_moment(), pool);
        let products = Products {
            cross: row_dots(&found, &weighted, rank),
            own: product_by_columns(directions, directions.transposed(), pool),
            inputs: product_by_columns(MatrixView::new(&weighted, rank, columns), a.transposed(), pool),
        };
        products.energies(residual.energy())
    }
}

impl HoldOutProfile {
    /// The profile of factors, or of none, on inputs and with what W makes of them, where that is known.
    pub(crate) fn new(
        residual: &Residual<'_>,
        factors: Option<&LowRank>,
        weight: &dyn RowSource,
        (hold_out, outputs): (&HoldOut, Option<&OutputSquares>),
        pool: &ThreadPool,
    ) -> Self {
        let parts = hold_out.halves();
        let (rows, columns) = (residual.rows(), residual.columns());
        let delta = |i: usize, row: &mut [f32]| {
            let delta = &residual.delta()[i * columns..(i + 1) * columns];
            row.iter_mut().zip(delta).for_each(|(out, &value)| *out = value as f32);
        };
        let mut before = parts.each_ref().map(|part| part.energy(rows, delta, |value| value, pool));
        let of_weight = |part: &HoldOut| part.energy(rows, |i, row| weight.row_to_f32(i, row), |value| value, pool);
        let known = outputs.and_then(|outputs| outputs.halves(hold_out.tokens()));
        let original = known.unwrap_or_else(|| parts.each_ref().map(of_weight));
        let tokens = parts[1].tokens();
        let Some(factors) = factors else {
            return HoldOutProfile { tokens, original, energies: before.map(|e| vec![e]) };
        };
        let rank = factors.rank();
        let (b, a) = (widen(factors.b()), widen(factors.a()));
        let directions = transposed(&b, rows, rank);
        let directions = MatrixView::new(&directions, rank, rows);
        let found = product_by_columns(directions, MatrixView::new(residual.delta(), rows, columns), pool);
        let own = product_by_columns(directions, directions.transposed(), pool);
        let energies = [0, 1].map(|half| {
            let inputs = parts[half].wide();
            let inputs = MatrixView::new(&inputs, parts[half].tokens(), columns).transposed();
            let found = product_by_columns(MatrixView::new(&found, rank, columns), inputs, pool);
            let projected = product_by_columns(MatrixView::new(&a, rank, columns), inputs, pool);
            let view = MatrixView::new(&projected, rank, parts[half].tokens());
            let inputs = product_by_columns(view, view.transposed(), pool);
            let products = Products { cross: row_dots(&found, &projected, rank), own: own.clone(), inputs };
            let energies = products.energies(before[half]);
            if energies[rank] >= LEAST_REST * before[half] {
                return energies;
            }
            // So little is left that the rounding of f32 shows in it.
            let exact =
                |i: usize, row: &mut [f64]| row.copy_from_slice(&residual.delta()[i * columns..(i + 1) * columns]);
            before[half] = parts[half].energy(rows, exact, f64::from, pool);
            products.energies(before[half])
        });
        HoldOutProfile { tokens, original, energies }
    }
}

/// Share of an energy in f32 that its error does not show in.
const LEAST_REST: f64 = 0.01;

/// What `‖(Δ − B A) X‖² = ‖Δ X‖² − 2 Σᵢ ⟨bᵢᵀ Δ X, aᵢ X⟩ + Σᵢⱼ ⟨bᵢ, bⱼ⟩ ⟨aᵢ X, aⱼ X⟩` is made of.
pub(crate) struct Products {
    /// `⟨bᵢᵀ Δ X, aᵢ X⟩`
    pub(crate) cross: Vec<f64>,
    /// `⟨bᵢ, bⱼ⟩`
    pub(crate) own: Vec<f64>,
    /// `⟨aᵢ X, aⱼ X⟩`
    pub(crate) inputs: Vec<f64>,
}

impl Products {
    /// For the ranks 0, 1, …, of which the first leaves `before`.
    pub(crate) fn energies(&self, before: f64) -> Vec<f64> {
        let rank = self.cross.len();
        let mut energies = vec![before];
        let mut energy = before;
        for i in 0..rank {
            let with = |j: usize| self.own[i * rank + j] * self.inputs[i * rank + j];
            energy += with(i) + 2.0 * (0..i).map(with).sum::<f64>() - 2.0 * self.cross[i];
            energies.push(energy.max(0.0));
        }
        energies
    }
}

/// The inner product of each row of two `[rows, width]` matrices.
pub(crate) fn row_dots(left: &[f64], right: &[f64], rows: usize) -> Vec<f64> {
    let width = left.len() / rows.max(1);
    let pairs = left.chunks_exact(width.max(1)).zip(right.chunks_exact(width.max(1)));
    pairs.map(|(left, right)| left.iter().zip(right).map(|(a, b)| a * b).sum()).collect()
}
