use kintsugi_linalg::UpperTriangle;
use kintsugi_weights::ElementType;

use crate::{Clip, QuantizeOptions};

/// How the grid of a group is chosen from the smallest and the largest weight of the group.
///
/// The range rule of GPTQ (arXiv 2210.17323 and its reference implementation): zero is always inside the range, and a
/// group of zeros gets the range [−1, 1].
/// - Asymmetric: `scale = (max − min) / (2^b − 1)`, `zero = round(−min / scale)`.
/// - Symmetric: the range is [−M, M] with `M = max |w|`, so `scale = 2 M / (2^b − 1)` and `zero = 2^(b−1)`. Neither end
///   falls on a code: −M is rounded half a step outwards and M half a step inwards.
///
/// The scale is rounded to the type that it will be stored in before the zero point and the codes are chosen. It never
/// becomes zero, and never so large that a code decodes to infinity.
///
/// With clipping, the range is multiplied by the factor whose grid has the least error. Factor 1 is among those that
/// are tried, so by its own measure clipping never loses. With [`Clip::Weights`] factors are `1 − i/100`, `i < 80`, and
/// the error is `Σ |w − ŵ|^2.4`, both as in the reference implementation, or `Σ S_jj (w_j − ŵ_j)²` where the second moments
/// of the inputs are known. With [`Clip::Outputs`] factors are `1 − i/20`, `i < 10`, and the error is that of what the
/// group adds to the output, `δ S δᵀ` with `δ = w − ŵ`, as in AWQ (arXiv 2306.00978, its reference implementation).
#[derive(Clone, Copy, Debug)]
pub struct GridRule {
    bits: u8,
    symmetric: bool,
    scale_type: ElementType,
    clip: Clip,
}

/// What is known of the inputs that a group multiplies.
#[derive(Clone, Copy, Debug)]
pub struct GroupInputs<'a> {
    /// `S_jj` of each.
    pub energies: &'a [f64],
    /// All of S, where the group is a run of neighbours, and the first of them.
    pub moment: Option<(&'a UpperTriangle<f64>, usize)>,
    /// What each weight is multiplied by and its input still has to be divided by, if anything.
    pub factors: Option<&'a [f32]>,
}

/// Exponent of the error without statistics.
const CLIP_EXPONENT: f32 = 2.4;

/// The grid of one group: `w = (code − zero) · scale`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Grid {
    /// Step, already rounded to the stored type.
    pub scale: f32,
    /// The code that stands for 0.
    pub zero: u8,
    largest_code: u8,
}

impl GridRule {
    /// The rule that `options` asks for.
    pub fn new(options: &QuantizeOptions) -> Self {
        let QuantizeOptions { bits, symmetric, scale_type, clip, .. } = *options;
        GridRule { bits, symmetric, scale_type, clip }
    }

    /// The grid for a group of weights. Only clipping asks for their inputs.
    pub fn fit(&self, weights: &[f32], inputs: Option<GroupInputs<'_>>) -> Grid {
        let low = weights.iter().fold(0.0f32, |low, &weight| low.min(weight));
        let high = weights.iter().fold(0.0f32, |high, &weight| high.max(weight));
        let (mut low, mut high) = (f64::from(low), f64::from(high));
        if low == 0.0 && high == 0.0 {
            (low, high) = (-1.0, 1.0);
        }
        if self.symmetric {
            high = high.max(-low);
            low = -high;
        }
        let whole = self.over(low, high);
        let (steps, parts) = match self.clip {
            Clip::Never => return whole,
            Clip::Weights => (80, 100.0),
            Clip::Outputs => (10, 20.0),
        };
        let mut best = (self.clip_error(whole, weights, inputs, f64::INFINITY), whole);
        for step in 1..steps {
            let factor = 1.0 - f64::from(step) / parts;
            let grid = self.over(low * factor, high * factor);
            let error = self.clip_error(grid, weights, inputs, best.0);
            if error < best.0 {
                best = (error, grid);
            }
        }
        best.1
    }

    /// The grid over the range from `low` to `high`.
    fn over(&self, low: f64, high: f64) -> Grid {
        let largest_code = self.largest_code();
        let scale = self.storable((high - low) / f64::from(largest_code), largest_code);
        let zero = if self.symmetric {
            1 << (self.bits - 1)
        } else {
            (-low / f64::from(scale)).round_ties_even().clamp(0.0, f64::from(largest_code)) as u8
        };
        Grid { scale, zero, largest_code }
    }

    /// The largest code of every grid; the smallest is 0.
    pub fn largest_code(&self) -> u8 {
        ((1u16 << self.bits) - 1) as u8
    }

    /// The error that clipping minimises; any number that is not below `limit` once it is clear that the error is not.
    fn clip_error(&self, grid: Grid, weights: &[f32], inputs: Option<GroupInputs<'_>>, limit: f64) -> f64 {
        let factors = inputs.and_then(|inputs| inputs.factors);
        let errors = weights.iter().enumerate().map(|(at, &weight)| {
            let error = weight - grid.value(grid.code(weight));
            factors.map_or(error, |factors| error / factors[at])
        });
        match (self.clip, inputs) {
            (Clip::Outputs, Some(GroupInputs { moment: Some((moment, first)), .. })) => {
                let errors: Vec<f64> = errors.map(f64::from).collect();
                quadratic_form(&errors, moment, first)
            }
            (_, Some(GroupInputs { energies, .. })) => {
                let terms = errors.zip(energies).map(|(error, energy)| energy * f64::from(error) * f64::from(error));
                sum_below(terms, limit)
            }
            (_, None) => sum_below(errors.map(|error| f64::from(error.abs().powf(CLIP_EXPONENT))), limit),
        }
    }

    /// The nearest value of the stored type that is positive and decodes every code to a finite number.
    fn storable(&self, scale: f64, largest_code: u8) -> f32 {
        let (smallest, largest) = match self.scale_type {
            ElementType::F32 => (f32::from_bits(1), f32::MAX),
            ElementType::Bf16 => (f32::from_bits(1 << 16), f32::MAX),
            ElementType::F16 => (2.0f32.powi(-24), 65504.0),
        };
        // One percent is more than rounding to any of the types can add.
        let largest = largest.min(f32::MAX / f32::from(largest_code) * 0.99);
        self.scale_type.round(scale.min(f64::from(largest)) as f32).max(smallest)
    }
}

/// The sum of terms that are not negative, given up when it reaches `limit`.
fn sum_below(terms: impl Iterator<Item = f64>, limit: f64) -> f64 {
    let mut sum = 0.0;
    for term in terms {
        sum += term;
        if sum >= limit {
            break;
        }
    }
    sum
}

/// `δ S δᵀ` where δ belongs to the columns of S from `first` on.
fn quadratic_form(delta: &[f64], s: &UpperTriangle<f64>, first: usize) -> f64 {
    const LANES: usize = 4;
    let mut total = 0.0;
    for (i, &value) in delta.iter().enumerate() {
        let (row, behind) = (&s.row(first + i)[..delta.len() - i], &delta[i + 1..]);
        let (mut lanes, mut sum) = ([0.0; LANES], 0.0);
        let (rows, deltas) = (row[1..].chunks_exact(LANES), behind.chunks_exact(LANES));
        for (s, d) in rows.remainder().iter().zip(deltas.remainder()) {
            sum += s * d;
        }
        for (s, d) in rows.zip(deltas) {
            for lane in 0..LANES {
                lanes[lane] += s[lane] * d[lane];
            }
        }
        sum += lanes.iter().sum::<f64>();
        total += value * (row[0] * value + 2.0 * sum);
    }
    total
}

impl Grid {
    /// The code nearest to `weight`; half-way cases go to the even multiple of the scale.
    pub fn code(&self, weight: f32) -> u8 {
        let steps = (weight / self.scale).round_ties_even() + f32::from(self.zero);
        steps.clamp(0.0, f32::from(self.largest_code)) as u8
    }

    /// What `code` stands for, computed as readers of the stored matrix do.
    pub fn value(&self, code: u8) -> f32 {
        (f32::from(code) - f32::from(self.zero)) * self.scale
    }
}

#[cfg(test)]
mod tests {
    use kintsugi_testkit::Random;

    use super::*;

    fn rule(bits: u8, symmetric: bool, scale_type: ElementType) -> GridRule {
        GridRule { bits, symmetric, scale_type, clip: Clip::Never }
    }

    #[test]
    fn asymmetric_range_holds_zero_and_both_ends() {
        let grid = rule(4, false, ElementType::F32).fit(&[-1.0, 0.3, 2.0], None);
        assert_eq!((grid.scale, grid.zero), (0.2, 5));
        assert_eq!((grid.code(-1.0), grid.code(0.0), grid.code(2.0)), (0, 5, 15));
        assert_eq!((grid.code(-9.0), grid.code(9.0)), (0, 15));
        let positive = rule(4, false, ElementType::F32).fit(&[7.0, 7.5], None);
        assert_eq!((positive.scale, positive.zero, positive.code(7.5)), (0.5, 0, 15));
        let negative = rule(2, false, ElementType::F32).fit(&[-3.0], None);
        assert_eq!((negative.scale, negative.zero, negative.value(0)), (1.0, 3, -3.0));
    }

    #[test]
    fn symmetric_range_fits_the_largest_magnitude_of_either_sign() {
        for weights in [[-1.5, 0.2], [1.5, 0.2], [1.5, 1.2]] {
            let grid = rule(4, true, ElementType::F32).fit(&weights, None);
            assert_eq!((grid.scale, grid.zero), (0.2, 8));
            assert!((grid.value(grid.code(1.5)) - 1.5).abs() <= 0.100_001);
            assert!((grid.value(grid.code(-1.5)) + 1.5).abs() <= 0.100_001);
        }
    }

    #[test]
    fn half_way_cases_go_to_even() {
        let grid = Grid { scale: 1.0, zero: 4, largest_code: 15 };
        assert_eq!([0.5, 1.5, 2.5, -0.5, -1.5].map(|w| grid.code(w)), [4, 6, 6, 4, 2]);
    }

    #[test]
    fn a_group_of_zeros_stays_zero() {
        for symmetric in [false, true] {
            for bits in [2, 3, 4, 5, 6, 8] {
                let grid = rule(bits, symmetric, ElementType::Bf16).fit(&[0.0; 3], None);
                assert_eq!(grid.value(grid.code(0.0)), 0.0);
                assert!(grid.scale > 0.0 && grid.scale <= 1.0);
            }
        }
    }

    #[test]
    fn scales_are_storable_positive_and_finite_for_any_magnitude() {
        for scale_type in ElementType::ALL {
            for bits in [2, 3, 4, 5, 6, 8] {
                for symmetric in [false, true] {
                    for size in [1e-45f32, 1e-39, 1e-9, 1.0, 1e6, 1e37, f32::MAX] {
                        for weights in [[-size, size], [0.0, size], [-size, 0.0]] {
                            let grid = rule(bits, symmetric, scale_type).fit(&weights, None);
                            assert!(grid.scale > 0.0 && grid.scale == scale_type.round(grid.scale), "{grid:?}");
                            let span = if symmetric {
                                2.0 * f64::from(size)
                            } else {
                                f64::from(weights[1]) - f64::from(weights[0])
                            };
                            let steps = f64::from((1u16 << bits) - 1);
                            for weight in weights {
                                let value = grid.value(grid.code(weight));
                                assert!(value.is_finite(), "{grid:?}");
                                // Half a step, and at the far end what rounding the scale has moved.
                                let moved = (f64::from(grid.scale) - span / steps).abs() * steps;
                                let reach = f64::from(grid.scale) * 0.501 + moved;
                                // Of ±f32::MAX the range itself is no f32, and 65504 is the end of f16.
                                let limit = if scale_type == ElementType::F16 { 6e4 } else { 1e37 };
                                assert!(
                                    size > limit || (f64::from(value) - f64::from(weight)).abs() <= reach,
                                    "{grid:?} {weight:e}: {value:e}"
                                );
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn clipping_never_loses_by_its_own_measure_and_gains_on_long_tails() {
        let mut random = Random::new(3);
        let (first, count, width) = (5, 128, 140);
        let x: Vec<f64> = (0..30 * width).map(|_| random.normal()).collect();
        let moment: Vec<f64> = (0..width * width)
            .map(|at| x.chunks_exact(width).map(|row| row[at / width] * row[at % width]).sum())
            .collect();
        let energies: Vec<f64> = (first..first + count).map(|j| moment[j * (width + 1)]).collect();
        let moment = UpperTriangle::of(&moment, width);
        let inputs = GroupInputs { energies: &energies, moment: Some((&moment, first)), factors: None };
        let (mut gained, mut cases) = (0, 0);
        for bits in [2, 3, 4, 8] {
            for symmetric in [false, true] {
                for (tail, clip) in
                    [(1.0, Clip::Weights), (3.0, Clip::Weights), (1.0, Clip::Outputs), (3.0, Clip::Outputs)]
                {
                    let clipping = GridRule { clip, ..rule(bits, symmetric, ElementType::Bf16) };
                    let weights: Vec<f32> =
                        (0..count).map(|_| random.normal()).map(|z| (z.abs().powf(tail) * z.signum()) as f32).collect();
                    for inputs in [None, Some(inputs)] {
                        let error = |rule: GridRule| {
                            clipping.clip_error(rule.fit(&weights, inputs), &weights, inputs, f64::INFINITY)
                        };
                        let (before, after) = (error(GridRule { clip: Clip::Never, ..clipping }), error(clipping));
                        assert!(after <= before, "{bits} {symmetric} {tail} {clip:?}: {after} {before}");
                        gained += usize::from(after < 0.9 * before);
                        cases += 1;
                    }
                }
            }
        }
        assert!(gained * 2 > cases, "{gained} of {cases}");
    }

    #[test]
    fn the_error_of_the_outputs_is_the_quadratic_form() {
        let mut random = Random::new(4);
        for count in [1, 2, 5, 13, 64] {
            let delta: Vec<f64> = (0..count).map(|_| random.normal()).collect();
            let x: Vec<f64> = (0..7 * count).map(|_| random.normal()).collect();
            let s: Vec<f64> = (0..count * count)
                .map(|at| x.chunks_exact(count).map(|row| row[at / count] * row[at % count]).sum())
                .collect();
            let output = |row: &[f64]| row.iter().zip(&delta).map(|(x, d)| x * d).sum::<f64>();
            let expected: f64 = x.chunks_exact(count).map(|row| output(row).powi(2)).sum();
            assert!(
                (quadratic_form(&delta, &UpperTriangle::of(&s, count), 0) - expected).abs()
                    < 1e-12 * expected.max(1.0) * count as f64
            );
        }
    }
}
