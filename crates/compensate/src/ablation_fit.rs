/// What an ablation says about Linears: weights for [`allocate_ranks`](crate::allocate_ranks) that explain what it costs
/// a model to lose all factors of one group of Linears.
///
/// Every Linear has a type (what it does in its block) and a band (how deep its block lies), and each type and each
/// band was left without factors once. With `x_ℓ` the energy that the factors of Linear ℓ remove and `w_ℓ` what it is
/// worth, a loss `c_g = Σ_{ℓ ∈ g} w_ℓ x_ℓ` is expected of group g: small errors of different Linears are nearly
/// uncorrelated, so that their energies add up, and a divergence is quadratic in the error as an energy is. With
/// `w_ℓ = t(type) · d(band)` and `M_{ij} = Σ x_ℓ` over the Linears of type i in band j this is
///
/// `t_i Σ_j M_{ij} d_j = r_i` for all types, `d_j Σ_i M_{ij} t_i = c_j` for all bands,
///
/// the classic problem of a matrix with given margins, which iterative proportional fitting solves: each half of a round
/// fulfils one side (Deming and Stephan 1940; Sinkhorn 1967 for its convergence). Losses are not quite additive, so that
/// both sides need not have one sum; only quotients of weights matter, so each side is first divided by its sum, and
/// likewise M. Then the mean of the weights, over the energy, is 1.
///
/// No group counts less per energy than a hundredth of the mean, measured nothing or not: what an ablation does not
/// notice in a small sample may still be worth a rank.
#[derive(Clone, Debug, PartialEq)]
pub struct AblationFit {
    /// Factor of each type; 1 for those that remove no energy.
    pub types: Vec<f64>,
    /// Factor of each band; 1 for those that remove no energy.
    pub bands: Vec<f64>,
}

/// A Linear of a model whose groups were ablated.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AblatedLinear {
    /// The index of its type.
    pub kind: usize,
    /// The index of its band.
    pub band: usize,
    /// The energy that its factors remove, in the unit that weights are wanted for.
    pub removed: f64,
}

/// Least cost per energy of a group, over the mean.
const FLOOR: f64 = 0.01;
/// Rounds of the fit; those of a positive matrix converge geometrically.
const ROUNDS: usize = 100;
/// What a factor can be, so that products stay finite and positive whatever was measured.
const FACTORS: std::ops::RangeInclusive<f64> = 1e-6..=1e6;

impl AblationFit {
    /// Fits factors to what ablating each type and each band costs. Costs and energies that are negative or not finite
    /// count as 0, as do Linears of groups that were not ablated. `None` where nothing can be learned: no cost is
    /// positive, or neither are there two types that remove energy nor two bands.
    pub fn new(linears: &[AblatedLinear], types: &[f64], bands: &[f64]) -> Option<Self> {
        let removed = matrix(linears, types.len(), bands.len())?;
        let width = bands.len();
        let of_types: Vec<f64> = removed.chunks(width).map(|row| row.iter().sum()).collect();
        let of_bands: Vec<f64> = (0..width).map(|band| removed.iter().skip(band).step_by(width).sum()).collect();
        let (type_costs, band_costs) = (shares(types, &of_types), shares(bands, &of_bands));
        if type_costs.is_none() && band_costs.is_none() {
            return None;
        }
        let (mut t, mut d) = (vec![1.0; types.len()], vec![1.0; width]);
        for _ in 0..ROUNDS {
            if let Some(costs) = &type_costs {
                let sum = |i: usize| (0..width).map(|j| removed[i * width + j] * d[j]).sum();
                t = costs.iter().enumerate().map(|(i, &cost)| bounded(quotient(cost, sum(i)))).collect();
            }
            if let Some(costs) = &band_costs {
                let sum = |j: usize| (0..t.len()).map(|i| removed[i * width + j] * t[i]).sum();
                d = costs.iter().enumerate().map(|(j, &cost)| bounded(quotient(cost, sum(j)))).collect();
            }
        }
        // The mean of the bands is 1 over the energy, and so is that of the weights.
        let mean = |factors: &[f64], over: &[f64]| factors.iter().zip(over).map(|(f, x)| f * x).sum::<f64>();
        let of_factors = mean(&d, &of_bands);
        scale(&mut d, of_factors, &of_bands);
        let of_weights = (0..removed.len()).map(|at| t[at / width] * d[at % width] * removed[at]).sum();
        scale(&mut t, of_weights, &of_types);
        Some(AblationFit { types: t, bands: d })
    }

    /// What an energy of a Linear of that type, in that band, counts: finite and above zero; 1 for groups that are not
    /// there.
    pub fn weight(&self, kind: usize, band: usize) -> f64 {
        let of = |factors: &[f64], at: usize| factors.get(at).copied().unwrap_or(1.0);
        of(&self.types, kind) * of(&self.bands, band)
    }
}

/// The energies by type and band, row by row, as shares of all; `None` where none is positive.
fn matrix(linears: &[AblatedLinear], types: usize, bands: usize) -> Option<Vec<f64>> {
    let known = |linear: &&AblatedLinear| linear.kind < types && linear.band < bands;
    let largest = linears.iter().filter(known).map(|linear| sound(linear.removed)).fold(0.0, f64::max);
    let mut removed = vec![0.0; types * bands];
    for linear in linears.iter().filter(known) {
        // Divided first: sums of the largest numbers would overflow.
        removed[linear.kind * bands + linear.band] += quotient(sound(linear.removed), largest);
    }
    let total: f64 = removed.iter().sum();
    removed.iter_mut().for_each(|value| *value = quotient(*value, total));
    (total > 0.0).then_some(removed)
}

/// The costs of the groups that remove energy as shares of all their costs, none far below the share of its energy;
/// `None` where they say nothing.
fn shares(costs: &[f64], removed: &[f64]) -> Option<Vec<f64>> {
    let counts = || costs.iter().zip(removed).filter(|&(_, &removed)| removed > 0.0);
    let largest = counts().map(|(&cost, _)| sound(cost)).fold(0.0, f64::max);
    let total: f64 = counts().map(|(&cost, _)| quotient(sound(cost), largest)).sum();
    if counts().count() < 2 || total == 0.0 {
        return None;
    }
    let raised = |(&cost, &removed): (&f64, &f64)| {
        if removed > 0.0 { (quotient(sound(cost), largest) / total).max(FLOOR * removed) } else { 0.0 }
    };
    let raised: Vec<f64> = costs.iter().zip(removed).map(raised).collect();
    let total: f64 = raised.iter().sum();
    Some(raised.into_iter().map(|cost| cost / total).collect())
}

/// Divides factors by a mean, but for those of groups without energy, which become 1.
fn scale(factors: &mut [f64], mean: f64, removed: &[f64]) {
    for (factor, &removed) in factors.iter_mut().zip(removed) {
        let scaled = if removed > 0.0 && mean > 0.0 { *factor / mean } else { 1.0 };
        *factor = bounded(scaled);
    }
}

fn bounded(factor: f64) -> f64 {
    factor.clamp(*FACTORS.start(), *FACTORS.end())
}

/// `a / b`, or 0 where b is.
fn quotient(a: f64, b: f64) -> f64 {
    if b > 0.0 { a / b } else { 0.0 }
}

/// Numbers that can be costs or energies, 0 in place of others.
fn sound(value: f64) -> f64 {
    if value.is_finite() && value > 0.0 { value } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use kintsugi_linalg::SplitMix64;

    use super::*;

    /// Two Linears for each type and band, and what ablations cost if weights are products of these factors.
    fn separable(types: &[f64], bands: &[f64]) -> (Vec<AblatedLinear>, Vec<f64>, Vec<f64>) {
        let mut linears = Vec::new();
        let mut costs = (vec![0.0; types.len()], vec![0.0; bands.len()]);
        for (kind, t) in types.iter().enumerate() {
            for (band, d) in bands.iter().enumerate() {
                for twin in 0..2 {
                    let removed = 0.1 + ((7 * kind + 3 * band + 5 * twin) % 11) as f64;
                    linears.push(AblatedLinear { kind, band, removed });
                    costs.0[kind] += t * d * removed;
                    costs.1[band] += t * d * removed;
                }
            }
        }
        (linears, costs.0, costs.1)
    }

    /// The mean of the weights over the energies.
    fn mean_weight(fit: &AblationFit, linears: &[AblatedLinear]) -> f64 {
        let total: f64 = linears.iter().map(|linear| linear.removed).sum();
        linears.iter().map(|linear| fit.weight(linear.kind, linear.band) * linear.removed).sum::<f64>() / total
    }

    #[test]
    fn separable_costs_give_back_their_factors() {
        let (types, bands) = ([1.0, 0.3, 5.0, 2.0, 0.7, 1.3, 9.0], [4.0, 1.0, 0.5, 2.0]);
        let (linears, type_costs, band_costs) = separable(&types, &bands);
        // Sums that are not additive change nothing.
        for excess in [1.0, 0.4, 3.0] {
            let band_costs: Vec<f64> = band_costs.iter().map(|cost| cost * excess).collect();
            let fit = AblationFit::new(&linears, &type_costs, &band_costs).unwrap();
            assert!((mean_weight(&fit, &linears) - 1.0).abs() < 1e-12);
            let unit = types[0] * bands[0] / fit.weight(0, 0);
            for (kind, t) in types.iter().enumerate() {
                for (band, d) in bands.iter().enumerate() {
                    let found = fit.weight(kind, band) * unit;
                    assert!((found / (t * d) - 1.0).abs() < 1e-9, "{kind} {band}: {found} instead of {}", t * d);
                }
            }
        }
    }

    #[test]
    fn one_band_or_one_type_is_fitted_by_the_other_side_alone() {
        let (linears, types, bands) = separable(&[1.0, 3.0], &[2.0]);
        let fit = AblationFit::new(&linears, &types, &bands).unwrap();
        assert!((fit.types[1] / fit.types[0] - 3.0).abs() < 1e-12 && (fit.bands[0] - 1.0).abs() < 1e-12);
        let (linears, types, bands) = separable(&[2.0], &[1.0, 3.0]);
        let fit = AblationFit::new(&linears, &types, &bands).unwrap();
        assert!((fit.bands[1] / fit.bands[0] - 3.0).abs() < 1e-12, "{fit:?}");
        assert!((mean_weight(&fit, &linears) - 1.0).abs() < 1e-12);
    }

    #[test]
    fn where_nothing_can_be_learned_there_is_no_fit() {
        let (linears, types, bands) = separable(&[1.0], &[1.0]);
        assert_eq!(AblationFit::new(&linears, &types, &bands), None);
        let (linears, types, bands) = separable(&[1.0, 2.0], &[1.0, 2.0]);
        assert_eq!(AblationFit::new(&linears, &[0.0; 2], &[0.0; 2]), None);
        assert_eq!(AblationFit::new(&linears, &[f64::NAN; 2], &[-1.0, f64::INFINITY]), None);
        assert_eq!(AblationFit::new(&[], &types, &bands), None);
        assert_eq!(AblationFit::new(&linears, &[], &[]), None);
        let spent: Vec<AblatedLinear> =
            linears.iter().map(|&linear| AblatedLinear { removed: 0.0, ..linear }).collect();
        assert_eq!(AblationFit::new(&spent, &types, &bands), None);
    }

    #[test]
    fn what_costs_nothing_keeps_a_small_weight_and_what_removes_nothing_a_neutral_one() {
        let (mut linears, mut types, bands) = separable(&[1.0, 1.0, 1.0], &[1.0, 1.0]);
        types[1] = 0.0;
        let fit = AblationFit::new(&linears, &types, &bands).unwrap();
        let quotient = fit.types[1] / fit.types[0];
        assert!(quotient > 0.001 && quotient < 0.02, "{fit:?}");
        linears.iter_mut().filter(|linear| linear.kind == 2).for_each(|linear| linear.removed = 0.0);
        let fit = AblationFit::new(&linears, &types, &bands).unwrap();
        assert_eq!(fit.types[2], 1.0);
    }

    #[test]
    fn weights_are_finite_and_positive_whatever_was_measured() {
        let odd = [0.0, -1.0, f64::NAN, f64::INFINITY, f64::NEG_INFINITY, f64::MAX, f64::MIN_POSITIVE, 5e-324, 1e300];
        let mut random = SplitMix64::new(7);
        let mut found = 0;
        for _ in 0..20_000 {
            let mut below = |limit: u64| (random.bits() % limit) as usize;
            let (types, bands, count) = (below(6), 1 + below(4), 2 + below(20));
            let mut number = || if below(3) == 0 { odd[below(odd.len() as u64)] } else { below(1000) as f64 / 100.0 };
            let costs = [types, bands].map(|count| (0..count).map(|_| number()).collect::<Vec<f64>>());
            let energies: Vec<f64> = (0..count).map(|_| number()).collect();
            // Some of groups that are not there.
            let linear = |removed| AblatedLinear { kind: below(6), band: below(5), removed };
            let linears: Vec<AblatedLinear> = energies.into_iter().map(linear).collect();
            let Some(fit) = AblationFit::new(&linears, &costs[0], &costs[1]) else { continue };
            found += 1;
            for (kind, band) in (0..7).flat_map(|kind| (0..6).map(move |band| (kind, band))) {
                let weight = fit.weight(kind, band);
                assert!(weight.is_finite() && weight > 0.0, "{weight} for {linears:?} {costs:?}");
            }
        }
        assert!(found > 4_000, "{found}");
    }
}
