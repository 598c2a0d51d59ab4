use kintsugi_linalg::{MatrixView, product_by_columns, quadratic_trace_of, times_symmetric_by_columns, transposed};
use kintsugi_runtime::{Result, ThreadPool};
use kintsugi_weights::{LowRank, RowSource};
use serde::{Deserialize, Serialize};

use crate::compensation::widen;
use crate::rank_profile::{Products, row_dots};
use crate::residual::{lost, relative};
use crate::residual_error::wide_row;
use crate::{HoldOut, HoldOutError, MixedInputs};

/// What each prefix of the stored factors leaves between the outputs of the dense model and of the deployed one: energies
/// `‖W X − (Ŵ + B_r A_r) X̂‖²` for the ranks 0, 1, …
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DenseProfile {
    /// On the calibration tokens.
    pub calibration: DenseEnergies,
    /// On the part of the tokens that took no part which is reported.
    pub hold_out: Option<DenseEnergies>,
}

/// The same on some tokens.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DenseEnergies {
    /// Number of tokens.
    pub tokens: usize,
    /// `‖W X‖²`
    pub original: f64,
    /// By rank.
    pub energies: Vec<f64>,
}

/// Errors of a Linear against the outputs of the dense model on its own inputs: `‖W X − · X̂‖ / ‖W X‖` (Frobenius).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DenseError {
    /// Of the compressed weight.
    pub quantized: f64,
    /// Of the compressed and compensated weight.
    pub compensated: f64,
    /// On tokens that took no part in the calibration; `None` without.
    pub hold_out: Option<HoldOutError>,
}

impl DenseProfile {
    /// The errors with the first `rank` directions, as many as there are.
    pub fn error(&self, rank: usize) -> DenseError {
        let HoldOutError { quantized, compensated, .. } = self.calibration.error(rank);
        DenseError { quantized, compensated, hold_out: self.hold_out.as_ref().map(|held| held.error(rank)) }
    }

    /// Whether it says something about rank 0 at least.
    pub(crate) fn is_sound(&self) -> bool {
        let held = self.hold_out.iter();
        [&self.calibration].into_iter().chain(held).all(|energies| !energies.energies.is_empty())
    }
}

impl DenseEnergies {
    fn error(&self, rank: usize) -> HoldOutError {
        let of = |rank: usize| self.energies.get(rank).or(self.energies.last()).map_or(0.0, |&energy| energy);
        let error = |rank| relative(of(rank), self.original);
        HoldOutError { tokens: self.tokens, quantized: error(0), compensated: error(rank) }
    }
}

/// Energies of the outputs that do not depend on factors.
pub(crate) struct DenseOutputs {
    /// `‖W X‖²`
    original: f64,
    /// `‖W X − Ŵ X̂‖²`
    before: f64,
}

impl DenseOutputs {
    /// Of inputs that are the same in both models.
    pub(crate) fn without_drift(
        weight: &dyn RowSource,
        delta: &[f64],
        inputs: &MixedInputs<'_>,
        pool: &ThreadPool,
    ) -> Self {
        let (rows, second_moment) = (weight.rows(), inputs.deployed.second_moment());
        let fill = |i: usize, row: &mut [f64]| row.copy_from_slice(&delta[i * row.len()..(i + 1) * row.len()]);
        DenseOutputs {
            original: quadratic_trace_of(rows, |i, row| wide_row(weight, i, row), second_moment, pool),
            before: quadratic_trace_of(rows, fill, second_moment, pool),
        }
    }

    /// With `drifted` = W D: `‖W X‖² = ‖W X̂‖² + 2⟨W D, W⟩ + tr(W E Wᵀ)`, and
    /// `‖W X − Ŵ X̂‖² = ‖Δ X̂‖² + 2⟨W D, Δ⟩ + tr(W E Wᵀ)`.
    pub(crate) fn new(
        weight: &dyn RowSource,
        delta: &[f64],
        drifted: &[f64],
        inputs: &MixedInputs<'_>,
        pool: &ThreadPool,
    ) -> Self {
        let (rows, columns) = (weight.rows(), weight.columns());
        let of_rows = pool.map(rows, |i| {
            let mut own = vec![0.0; columns];
            wide_row(weight, i, &mut own);
            let range = i * columns..(i + 1) * columns;
            let dot = |row: &[f64]| drifted[range.clone()].iter().zip(row).map(|(a, b)| a * b).sum::<f64>();
            [dot(&own), dot(&delta[range.clone()])]
        });
        let cross = |at: usize| 2.0 * of_rows.iter().map(|dots| dots[at]).sum::<f64>();
        let square = quadratic_trace_of(rows, |i, row| wide_row(weight, i, row), inputs.drift.square(), pool);
        let plain = Self::without_drift(weight, delta, inputs, pool);
        DenseOutputs {
            original: (plain.original + cross(0) + square).max(0.0),
            before: (plain.before + cross(1) + square).max(0.0),
        }
    }

    /// What factors leave, or none.
    ///
    /// # Errors
    /// What [`lost`] refuses.
    pub(crate) fn profile(
        &self,
        weight: &dyn RowSource,
        compressed: &dyn RowSource,
        inputs: &MixedInputs<'_>,
        factors: Option<&LowRank>,
        pool: &ThreadPool,
    ) -> Result<DenseProfile> {
        let (rows, columns) = (weight.rows(), weight.columns());
        let delta = lost(weight, compressed, inputs.deployed, pool)?;
        let stored = factors.map(|factors| Projections::new(factors, weight, &delta, pool));
        let energies = |before: f64, of: &dyn Fn(&Projections) -> Products| match &stored {
            Some(projections) => of(projections).energies(before),
            None => vec![before],
        };
        let calibration = DenseEnergies {
            tokens: inputs.deployed.tokens() as usize,
            original: self.original,
            energies: energies(self.before, &|stored| stored.on_calibration(inputs, pool)),
        };
        let hold_out = inputs.hold_out.map(|(deployed, drift)| {
            let [[_, deployed], [_, drift]] = [deployed.halves(), drift.halves()];
            let pairs = drift.beside(&deployed);
            let both = |i: usize, row: &mut [f64]| {
                let (of_weight, of_delta) = row.split_at_mut(columns);
                wide_row(weight, i, of_weight);
                of_delta.copy_from_slice(&delta[i * columns..(i + 1) * columns]);
            };
            let twice = |i: usize, row: &mut [f64]| {
                let (first, second) = row.split_at_mut(columns);
                wide_row(weight, i, first);
                second.copy_from_slice(first);
            };
            let before = pairs.energy(rows, both, f64::from, pool);
            DenseEnergies {
                tokens: pairs.tokens(),
                original: pairs.energy(rows, twice, f64::from, pool),
                energies: energies(before, &|stored| stored.on_tokens(&pairs, &deployed, pool)),
            }
        });
        Ok(DenseProfile { calibration, hold_out })
    }
}

/// What factors of some rank are to both weights.
struct Projections {
    rank: usize,
    columns: usize,
    /// `[Bᵀ W, Bᵀ Δ]`, `[rank, 2 · columns]`: what they find in the outputs of a pair `(x − x̂, x̂)`.
    found: Vec<f64>,
    /// A, `[rank, columns]`.
    a: Vec<f64>,
    /// `Bᵀ B`, `[rank, rank]`.
    own: Vec<f64>,
}

impl Projections {
    fn new(factors: &LowRank, weight: &dyn RowSource, delta: &[f64], pool: &ThreadPool) -> Self {
        let (rows, columns, rank) = (weight.rows(), weight.columns(), factors.rank());
        let directions = transposed(&widen(factors.b()), rows, rank);
        let directions = MatrixView::new(&directions, rank, rows);
        let of_delta = product_by_columns(directions, MatrixView::new(delta, rows, columns), pool);
        let mut wide = vec![0.0; rows * columns];
        pool.for_each_chunk(&mut wide, columns.max(1), |i, row| wide_row(weight, i, row));
        let of_weight = product_by_columns(directions, MatrixView::new(&wide, rows, columns), pool);
        let pairs = of_weight.chunks_exact(columns).zip(of_delta.chunks_exact(columns));
        Projections {
            rank,
            columns,
            found: pairs.flat_map(|(of_weight, of_delta)| [of_weight, of_delta].concat()).collect(),
            a: widen(factors.a()),
            own: product_by_columns(directions, directions.transposed(), pool),
        }
    }

    /// From the sums over the calibration tokens: `⟨bᵢᵀ(W D + Δ S), aᵢ⟩` and `aᵢ S aⱼᵀ`.
    fn on_calibration(&self, inputs: &MixedInputs<'_>, pool: &ThreadPool) -> Products {
        let (rank, columns) = (self.rank, self.columns);
        let a = MatrixView::new(&self.a, rank, columns);
        let drift = MatrixView::new(inputs.drift.cross(), columns, columns);
        let by_drift = product_by_columns(a, drift.transposed(), pool);
        let by_inputs = times_symmetric_by_columns(a, inputs.deployed.second_moment(), pool);
        let pairs = by_drift.chunks_exact(columns).zip(by_inputs.chunks_exact(columns));
        let weighted: Vec<f64> = pairs.flat_map(|(drift, inputs)| [drift, inputs].concat()).collect();
        Products {
            cross: row_dots(&self.found, &weighted, rank),
            own: self.own.clone(),
            inputs: product_by_columns(MatrixView::new(&by_inputs, rank, columns), a.transposed(), pool),
        }
    }

    /// From tokens: `pairs` holds `(x − x̂, x̂)` and `deployed` holds x̂.
    fn on_tokens(&self, pairs: &HoldOut, deployed: &HoldOut, pool: &ThreadPool) -> Products {
        let (rank, columns, tokens) = (self.rank, self.columns, pairs.tokens());
        let (both, own) = (pairs.wide(), deployed.wide());
        let both = MatrixView::new(&both, tokens, 2 * columns).transposed();
        let own = MatrixView::new(&own, tokens, columns).transposed();
        let found = product_by_columns(MatrixView::new(&self.found, rank, 2 * columns), both, pool);
        let projected = product_by_columns(MatrixView::new(&self.a, rank, columns), own, pool);
        let view = MatrixView::new(&projected, rank, tokens);
        Products {
            cross: row_dots(&found, &projected, rank),
            own: self.own.clone(),
            inputs: product_by_columns(view, view.transposed(), pool),
        }
    }
}
