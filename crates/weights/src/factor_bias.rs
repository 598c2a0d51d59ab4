use std::ops::Range;

/// The constant part of an affine update, `y = B (A x) + bias`: what its factors leave of the mean μ of the inputs that
/// they were solved for, `bias = (Δ − B A) μ`.
///
/// The bias of the first r ranks is that of all and what the others had found in the mean, `bias + Σ_{i≥r} bᵢ (aᵢ μ)`:
/// so a prefix of an affine update is the affine update of that rank.
#[derive(Clone, Debug, PartialEq)]
pub struct FactorBias {
    /// `[out]`, that of all ranks.
    pub values: Vec<f32>,
    /// `A μ`, `[rank]`; `None` where it is not known, and the ranks cannot be divided.
    pub centre: Option<Vec<f32>>,
}

impl FactorBias {
    /// Bits that the bias of so many outputs takes in memory. Centres are for dividing alone.
    pub fn stored_bits(out_features: usize) -> u64 {
        32 * out_features as u64
    }

    /// That of the first `kept` ranks; `b` is `[out, rank]`, row-major.
    ///
    /// # Panics
    /// When ranks are to be cut off and the centre is not known.
    pub(crate) fn prefix(&self, b: &[f32], rank: usize, kept: usize) -> FactorBias {
        if kept == rank {
            return self.clone();
        }
        let centre = self.centre.as_ref().expect("ranks of a bias without a centre cannot be divided");
        let cut = |(row, &value): (&[f32], &f32)| {
            let found = row[kept..].iter().zip(&centre[kept..]);
            (f64::from(value) + found.map(|(&b, &c)| f64::from(b) * f64::from(c)).sum::<f64>()) as f32
        };
        let values = b.chunks_exact(rank).zip(&self.values).map(cut).collect();
        FactorBias { values, centre: Some(centre[..kept].to_vec()) }
    }

    /// That of some of the outputs.
    pub(crate) fn of_outputs(&self, outputs: Range<usize>) -> FactorBias {
        FactorBias { values: self.values[outputs].to_vec(), centre: self.centre.clone() }
    }

    /// That of an update whose B is multiplied with `scaling`.
    pub(crate) fn scaled(&self, scaling: f32) -> FactorBias {
        let values = self.values.iter().map(|value| value * scaling).collect();
        FactorBias { values, centre: self.centre.clone() }
    }

    /// That of the sum of two updates of so many ranks, of which one may have none: what is cut off that one has found
    /// nothing in a mean.
    pub(crate) fn beside(parts: [(Option<&FactorBias>, usize); 2]) -> Option<FactorBias> {
        let mut sum: Option<Vec<f32>> = None;
        let mut centre = Some(Vec::new());
        for (bias, rank) in parts {
            let found = match bias {
                Some(bias) => bias.centre.clone(),
                None => Some(vec![0.0; rank]),
            };
            centre = centre.zip(found).map(|(before, found)| [before, found].concat());
            let Some(bias) = bias else { continue };
            match &mut sum {
                Some(sum) => sum.iter_mut().zip(&bias.values).for_each(|(sum, value)| *sum += value),
                None => sum = Some(bias.values.clone()),
            }
        }
        sum.map(|values| FactorBias { values, centre })
    }
}

#[cfg(test)]
mod tests {
    use crate::{ElementType, FactorBias, LowRank};

    fn update(values: &[f32], centre: Option<&[f32]>) -> LowRank {
        let (b, a) = (vec![1.0, 2.0, 3.0, 4.0], vec![1.0, -1.0, 0.5, 2.0, 0.0, 1.0]);
        let bias = FactorBias { values: values.to_vec(), centre: centre.map(<[f32]>::to_vec) };
        LowRank::new(2, 3, 2, b, a, ElementType::F32).with_bias(bias)
    }

    /// `B A x + bias`.
    fn answer(update: &LowRank, x: [f32; 3]) -> Vec<f32> {
        let rank = update.rank();
        let inner: Vec<f32> = update.a().chunks(3).map(|a| a.iter().zip(x).map(|(a, x)| a * x).sum()).collect();
        (0..update.out_features())
            .map(|i| {
                let row = &update.b()[i * rank..(i + 1) * rank];
                let found: f32 = row.iter().zip(&inner).map(|(b, x)| b * x).sum();
                found + update.bias().map_or(0.0, |bias| bias.values[i])
            })
            .collect()
    }

    #[test]
    fn what_is_cut_off_answers_as_it_did_to_the_mean() {
        // A μ of μ = (2, 1, 4).
        let (mean, whole) = ([2.0, 1.0, 4.0], update(&[10.0, 20.0], Some(&[3.0, 8.0])));
        let first = whole.prefix(1);
        assert_eq!(first.bias().unwrap().values, [10.0 + 2.0 * 8.0, 20.0 + 4.0 * 8.0]);
        assert_eq!(first.bias().unwrap().centre.as_deref(), Some(&[3.0][..]));
        assert_eq!(answer(&first, mean), answer(&whole, mean));
        assert_ne!(answer(&first, [0.0; 3]), answer(&whole, [0.0; 3]));
        assert_eq!(whole.prefix(2), whole);
        assert_eq!(whole.prefix(0).bias(), None, "no factors, no bias");
        assert_eq!((whole.stored_bits(), first.stored_bits()), (32 * (4 + 6 + 2), 32 * (2 + 3 + 2)));
    }

    #[test]
    fn a_bias_is_scaled_and_added_with_its_factors() {
        let whole = update(&[10.0, 20.0], Some(&[3.0, 8.0]));
        let x = [0.25, -1.0, 3.0];
        let scaled = whole.scaled(-0.5);
        assert_eq!(answer(&scaled, x), answer(&whole, x).iter().map(|y| -0.5 * y).collect::<Vec<_>>());
        assert_eq!(answer(&scaled.prefix(1), [2.0, 1.0, 4.0]), answer(&scaled, [2.0, 1.0, 4.0]));
        let plain = LowRank::new(2, 3, 1, vec![1.0, 1.0], vec![1.0, 1.0, 1.0], ElementType::F32);
        for (sum, centre) in [
            (whole.beside(&plain), vec![3.0, 8.0, 0.0]),
            (plain.beside(&whole), vec![0.0, 3.0, 8.0]),
            (whole.beside(&scaled), vec![3.0, 8.0, 3.0, 8.0]),
        ] {
            assert_eq!(sum.bias().unwrap().centre.as_ref(), Some(&centre));
            assert!(sum.is_divisible());
        }
        let both = [answer(&whole, x), answer(&plain, x)];
        let sum: Vec<f32> = both[0].iter().zip(&both[1]).map(|(a, b)| a + b).collect();
        assert_eq!(answer(&whole.beside(&plain), x), sum);
        assert_eq!(plain.beside(&plain).bias(), None);
    }

    #[test]
    fn without_a_centre_all_or_nothing_is_taken() {
        let unknown = update(&[10.0, 20.0], None);
        assert!(!unknown.is_divisible() && !unknown.beside(&update(&[0.0; 2], Some(&[0.0; 2]))).is_divisible());
        assert_eq!((unknown.prefix(2), unknown.prefix(0).bias()), (unknown.clone(), None));
        let (factors, bias) = unknown.clone().split_bias();
        assert_eq!((factors.bias(), bias), (None, Some(vec![10.0, 20.0])));
    }
}
