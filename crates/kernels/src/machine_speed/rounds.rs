use kintsugi_runtime::{CancelToken, Result, ThreadPool};

use super::pace::Pace;
use super::weight_kind::{GROUP_COLUMNS, WEIGHT_KINDS, WeightKind, activations};
use super::{ArithmeticCeiling, CeilingSpeed, MatrixRotation, ProductLimit, ProductSpeed, ReadingCeiling, Spread};
use crate::{Arithmetic, Kernels, Precision};

/// Outputs and inputs of every matrix: those of an attention projection of a 7B model.
pub(super) const SIZE: usize = 4096;

/// Rows from which on a round has one product of each kind: what multiplies for so long needs no mean, and hardly minds
/// whether its matrix comes from memory.
const LONG_ROWS: usize = 64;

/// Everything that takes turns.
pub(super) struct Rounds<'a> {
    pub(super) kernels: &'a Kernels,
    pub(super) reading: ReadingCeiling,
    pub(super) arithmetic: Vec<ArithmeticCeiling>,
    /// Of each of the [`WEIGHT_KINDS`].
    pub(super) rotations: Vec<MatrixRotation>,
    /// One thread, and all.
    pub(super) pools: Vec<&'a ThreadPool>,
}

/// Rates of the ceilings on the threads of a pool, round by round.
#[derive(Clone)]
pub(super) struct CeilingRates {
    reading: Vec<f64>,
    /// Of each of [`Rounds::arithmetic`].
    arithmetic: Vec<Vec<f64>>,
}

impl CeilingRates {
    fn append(&mut self, mut later: CeilingRates) {
        self.reading.append(&mut later.reading);
        self.arithmetic.iter_mut().zip(&mut later.arithmetic).for_each(|(rates, later)| rates.append(later));
    }
}

impl Rounds<'_> {
    /// No rates yet, for each pool.
    pub(super) fn no_rates(&self) -> Vec<CeilingRates> {
        let none = CeilingRates { reading: Vec::new(), arithmetic: vec![Vec::new(); self.arithmetic.len()] };
        vec![none; self.pools.len()]
    }

    /// Rounds of all ceilings and all kinds of products of so many rows, as long as the pace allows. Rates of the
    /// ceilings are appended to `all_rates`.
    pub(super) fn measure(
        &self,
        rows: usize,
        all_rates: &mut [CeilingRates],
        cancel: &CancelToken,
        pace: &mut Pace<'_>,
    ) -> Result<Vec<ProductSpeed>> {
        let x = activations(rows, SIZE);
        let mut y = vec![0.0; rows * SIZE];
        let mut rates = self.no_rates();
        let mut seconds = vec![vec![Vec::new(); self.pools.len()]; WEIGHT_KINDS.len()];
        let mut rounds = 0;
        while pace.another(rounds) {
            for (pool, rates) in self.pools.iter().zip(&mut rates) {
                cancel.check()?;
                rates.reading.push(self.reading.rate(pool));
                for (ceiling, rates) in self.arithmetic.iter().zip(&mut rates.arithmetic) {
                    cancel.check()?;
                    rates.push(ceiling.rate(pool));
                }
            }
            for (rotation, seconds) in self.rotations.iter().zip(&mut seconds) {
                // The mean of all copies, or one after another in each round.
                let turns = if rows < LONG_ROWS { 0..rotation.count() } else { rounds..rounds + 1 };
                let count = turns.len() as f64;
                for (pool, seconds) in self.pools.iter().zip(seconds) {
                    let mut sum = 0.0;
                    for turn in turns.clone() {
                        cancel.check()?;
                        sum += rotation.seconds_of_one(turn, self.kernels, &x, &mut y, pool);
                    }
                    seconds.push(sum / count);
                    pace.tick();
                }
            }
            rounds += 1;
        }
        let mut products = Vec::new();
        for ((kind, rotation), seconds) in WEIGHT_KINDS.iter().zip(&self.rotations).zip(&seconds) {
            for ((pool, rates), seconds) in self.pools.iter().zip(&rates).zip(seconds) {
                products.push(self.product_speed(kind, rotation, rows, pool.threads(), rates, seconds));
            }
        }
        all_rates.iter_mut().zip(rates).for_each(|(all, rates)| all.append(rates));
        Ok(products)
    }

    /// The rates of every ceiling on every pool.
    pub(super) fn ceiling_speeds(&self, all_rates: &[CeilingRates]) -> Vec<CeilingSpeed> {
        let mut speeds = Vec::new();
        for (pool, rates) in self.pools.iter().zip(all_rates) {
            let threads = pool.threads();
            speeds.push(CeilingSpeed {
                kind: "memory",
                instructions: "loads and sums",
                threads,
                rounds: rates.reading.len(),
                rate: Spread::of(&rates.reading),
            });
            speeds.extend(self.arithmetic.iter().zip(&rates.arithmetic).map(|(ceiling, rates)| CeilingSpeed {
                kind: ceiling.arithmetic().name(),
                instructions: ceiling.instructions(),
                threads,
                rounds: rates.len(),
                rate: Spread::of(rates),
            }));
        }
        speeds
    }

    fn product_speed(
        &self,
        kind: &WeightKind,
        rotation: &MatrixRotation,
        rows: usize,
        threads: usize,
        rates: &CeilingRates,
        seconds: &[f64],
    ) -> ProductSpeed {
        let arithmetic = self.kernels.arithmetic(rotation.matrix());
        let rate = |arithmetic| {
            let same = |ceiling: &ArithmeticCeiling| ceiling.arithmetic() == arithmetic;
            self.arithmetic.iter().position(same).map_or(f64::INFINITY, |at| Spread::of(&rates.arithmetic[at]).median)
        };
        let bytes = rotation.matrix().memory_bytes() as f64;
        let main = (2 * rows * SIZE * SIZE) as f64;
        let low_rank = (2 * rows * kind.rank * 2 * SIZE) as f64;
        let reading = bytes / Spread::of(&rates.reading).median;
        let multiplying = main / rate(arithmetic) + low_rank / rate(Arithmetic::F32);
        let rounds = seconds.len();
        let seconds = Spread::of(seconds);
        ProductSpeed {
            weights: kind.name(),
            group_size: kind.bits.map(|_| GROUP_COLUMNS),
            rank: kind.rank,
            precision: match kind.precision {
                Precision::F32 => "f32",
                Precision::Exact => "exact",
                Precision::Fast => "fast",
            },
            arithmetic: arithmetic.name(),
            bits_per_weight: 8.0 * bytes / (SIZE * SIZE) as f64,
            rows,
            threads,
            rounds,
            seconds,
            bytes_per_second: bytes / seconds.median,
            operations_per_second: (main + low_rank) / seconds.median,
            limit: if reading >= multiplying { ProductLimit::Memory } else { ProductLimit::Arithmetic },
            share: reading.max(multiplying) / seconds.median,
        }
    }
}
