use std::ops::Range;

use crate::{ElementType, FactorBias, GroupAxis, QuantizedMatrix};

/// A low-rank update `ΔW ≈ B · A` with `B [out, rank]` and `A [rank, in]`, both row-major.
///
/// Ranks are nested when the solver orders them: the first `r` columns of B and rows of A are the best update of
/// rank `r` of the same problem. An affine update has a [`FactorBias`] beside them, `ΔW x ≈ B (A x) + bias`.
#[derive(Clone, Debug, PartialEq)]
pub struct LowRank {
    out_features: usize,
    in_features: usize,
    rank: usize,
    b: Vec<f32>,
    a: Vec<f32>,
    factor_type: ElementType,
    codes: Option<FactorCodes>,
    bias: Option<FactorBias>,
}

/// The codes of a [`LowRank`] whose factors are quantized. Groups lie along the columns of each: along the ranks in B,
/// along the inputs in A, so that a prefix of the ranks is a prefix of the codes.
#[derive(Clone, Debug, PartialEq)]
pub struct FactorCodes {
    /// `[out, rank]`
    pub b: QuantizedMatrix,
    /// `[rank, in]`
    pub a: QuantizedMatrix,
}

impl LowRank {
    /// Rounds both factors to `factor_type` and keeps the rounded values.
    ///
    /// # Panics
    /// When a length does not fit.
    pub fn new(
        out_features: usize,
        in_features: usize,
        rank: usize,
        mut b: Vec<f32>,
        mut a: Vec<f32>,
        factor_type: ElementType,
    ) -> Self {
        assert_eq!(b.len(), out_features * rank, "B is [out, rank]");
        assert_eq!(a.len(), rank * in_features, "A is [rank, in]");
        for value in b.iter_mut().chain(a.iter_mut()) {
            *value = factor_type.round(*value);
        }
        LowRank { out_features, in_features, rank, b, a, factor_type, codes: None, bias: None }
    }

    /// Factors that are made of codes. Their type is that of the scales where it holds every value, else f32.
    ///
    /// # Panics
    /// When the factors do not belong together, or have groups that are not runs of columns.
    pub fn of_codes(codes: FactorCodes) -> Self {
        let FactorCodes { b, a } = &codes;
        assert_eq!(b.columns(), a.rows(), "B is [out, rank], A is [rank, in]");
        for factor in [b, a] {
            assert!(factor.group_axis() == GroupAxis::Input && factor.group_index().is_none(), "runs of columns");
        }
        let (b_values, a_values) = (b.to_f32(), a.to_f32());
        let declared = a.scale_type();
        let exact = b_values.iter().chain(&a_values).all(|&value| declared.round(value) == value);
        let factor_type = if exact { declared } else { ElementType::F32 };
        let (out_features, in_features, rank) = (b.rows(), a.columns(), a.rows());
        let (b, a, codes) = (b_values, a_values, Some(codes));
        LowRank { out_features, in_features, rank, b, a, factor_type, codes, bias: None }
    }

    /// The same with a constant part.
    ///
    /// # Panics
    /// When a length does not fit.
    #[must_use]
    pub fn with_bias(self, bias: FactorBias) -> Self {
        assert_eq!(bias.values.len(), self.out_features, "the bias is [out]");
        assert!(bias.centre.as_ref().is_none_or(|centre| centre.len() == self.rank), "the centre is [rank]");
        LowRank { bias: Some(bias), ..self }
    }

    /// The constant part of an affine update.
    pub fn bias(&self) -> Option<&FactorBias> {
        self.bias.as_ref()
    }

    /// The factors alone, and the constant part alone.
    #[must_use]
    pub fn split_bias(mut self) -> (Self, Option<Vec<f32>>) {
        let bias = self.bias.take();
        (self, bias.map(|bias| bias.values))
    }

    /// Whether [`LowRank::prefix`] may be asked for any rank: not of a bias whose centre is unknown.
    pub fn is_divisible(&self) -> bool {
        self.bias.as_ref().is_none_or(|bias| bias.centre.is_some())
    }

    /// The codes behind the values, where the factors are quantized.
    pub fn codes(&self) -> Option<&FactorCodes> {
        self.codes.as_ref()
    }

    /// Rows of the update.
    pub fn out_features(&self) -> usize {
        self.out_features
    }

    /// Columns of the update.
    pub fn in_features(&self) -> usize {
        self.in_features
    }

    /// Number of columns of B and rows of A.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// `[out, rank]`, row-major.
    pub fn b(&self) -> &[f32] {
        &self.b
    }

    /// `[rank, in]`, row-major.
    pub fn a(&self) -> &[f32] {
        &self.a
    }

    /// The type that the factors are rounded to.
    pub fn factor_type(&self) -> ElementType {
        self.factor_type
    }

    /// The first `rank` directions only, with the bias that they ask for; of rank 0 nothing.
    ///
    /// # Panics
    /// When some but not all are asked for and the update is not [divisible](LowRank::is_divisible).
    #[must_use]
    pub fn prefix(&self, rank: usize) -> LowRank {
        let rank = rank.min(self.rank);
        let bias = self.bias.as_ref().filter(|_| rank > 0).map(|bias| bias.prefix(&self.b, self.rank, rank));
        let b = self.b.chunks_exact(self.rank.max(1)).flat_map(|row| &row[..rank]).copied().collect();
        let a = self.a[..rank * self.in_features].to_vec();
        let codes = self.codes.as_ref().map(|codes| codes.prefix(rank));
        LowRank { rank, b, a, codes, bias, ..self.clone_shape() }
    }

    /// The update of some of the outputs: rows of B, and the same A.
    ///
    /// # Panics
    /// When there are no such outputs.
    #[must_use]
    pub fn of_outputs(&self, outputs: Range<usize>) -> LowRank {
        let b = self.b[outputs.start * self.rank..outputs.end * self.rank].to_vec();
        let codes =
            self.codes.as_ref().map(|codes| FactorCodes { b: codes.b.some_rows(outputs.clone()), a: codes.a.clone() });
        let bias = self.bias.as_ref().map(|bias| bias.of_outputs(outputs.clone()));
        LowRank {
            out_features: outputs.len(),
            b,
            codes,
            bias,
            rank: self.rank,
            a: self.a.clone(),
            ..self.clone_shape()
        }
    }

    /// `scaling · ΔW`: B is scaled, in codes its scales alone. Scales that their type does not hold then are f32.
    #[must_use]
    pub fn scaled(&self, scaling: f32) -> LowRank {
        let factors = match &self.codes {
            Some(FactorCodes { b, a }) => LowRank::of_codes(FactorCodes { b: b.scaled(scaling), a: a.clone() }),
            None => {
                let b = self.b.iter().map(|value| value * scaling).collect();
                LowRank::new(self.out_features, self.in_features, self.rank, b, self.a.clone(), self.factor_type)
            }
        };
        LowRank { bias: self.bias.as_ref().map(|bias| bias.scaled(scaling)), ..factors }
    }

    /// The sum of two updates of one matrix: the ranks of `other` behind those of `self`. Plain floats, in a type that
    /// holds both.
    ///
    /// # Panics
    /// When the shapes differ.
    #[must_use]
    pub fn beside(&self, other: &LowRank) -> LowRank {
        let shape = (self.out_features, self.in_features);
        assert_eq!(shape, (other.out_features, other.in_features), "updates of one matrix");
        let row = |i: usize| {
            let own = &self.b[i * self.rank..(i + 1) * self.rank];
            own.iter().chain(&other.b[i * other.rank..(i + 1) * other.rank]).copied()
        };
        let b = (0..self.out_features).flat_map(row).collect();
        let a = [self.a.as_slice(), other.a.as_slice()].concat();
        let factor_type = if self.factor_type == other.factor_type { self.factor_type } else { ElementType::F32 };
        let factors = LowRank::new(self.out_features, self.in_features, self.rank + other.rank, b, a, factor_type);
        let bias = FactorBias::beside([self, other].map(|update| (update.bias.as_ref(), update.rank)));
        LowRank { bias, ..factors }
    }

    /// Bits that the factors take in memory, those of their codes where they are quantized, and their bias.
    pub fn stored_bits(&self) -> u64 {
        let bias = self.bias.as_ref().map_or(0, |_| FactorBias::stored_bits(self.out_features));
        bias + match &self.codes {
            Some(FactorCodes { b, a }) => b.stored_bits() + a.stored_bits(),
            None => ((self.b.len() + self.a.len()) * self.factor_type.bits()) as u64,
        }
    }

    /// Bits of A among them.
    pub fn projection_bits(&self) -> u64 {
        match &self.codes {
            Some(FactorCodes { a, .. }) => a.stored_bits(),
            None => (self.a.len() * self.factor_type.bits()) as u64,
        }
    }

    fn clone_shape(&self) -> LowRank {
        LowRank {
            out_features: self.out_features,
            in_features: self.in_features,
            rank: 0,
            b: Vec::new(),
            a: Vec::new(),
            factor_type: self.factor_type,
            codes: None,
            bias: None,
        }
    }
}

impl FactorCodes {
    /// Those of the first `rank` directions.
    fn prefix(&self, rank: usize) -> FactorCodes {
        let (b, a) = (self.b.leading_columns(rank), self.a.leading_rows(rank));
        FactorCodes { b, a }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{GroupSize, QuantizedParts};

    #[test]
    fn factors_are_rounded_and_prefixes_are_nested() {
        let b = vec![1.001, 2.0, 3.0, 4.0, 5.0, 6.0];
        let a = vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0];
        let factors = LowRank::new(3, 4, 2, b, a, ElementType::Bf16);
        assert_eq!(factors.b()[0], 1.0);
        let first = factors.prefix(1);
        assert_eq!(first.rank(), 1);
        assert_eq!(first.b(), [1.0, 3.0, 5.0]);
        assert_eq!(first.a(), [1.0, 2.0, 3.0, 4.0]);
        assert_eq!(factors.prefix(9), factors);
        assert_eq!((factors.stored_bits(), factors.projection_bits()), ((6 + 8) * 16, 8 * 16));
    }

    #[test]
    fn two_updates_stand_beside_each_other() {
        let (x, y) = (ElementType::Bf16, ElementType::F32);
        let one = LowRank::new(2, 2, 1, vec![1.0, 2.0], vec![3.0, 4.0], x);
        let two = LowRank::new(2, 2, 2, vec![5.0, 6.0, 7.0, 8.0], vec![9.0, 10.0, 11.0, 12.0], y);
        let sum = one.beside(&two);
        assert_eq!((sum.rank(), sum.factor_type(), one.beside(&one).factor_type()), (3, y, x));
        assert_eq!(sum.b(), [1.0, 5.0, 6.0, 2.0, 7.0, 8.0]);
        assert_eq!(sum.a(), [3.0, 4.0, 9.0, 10.0, 11.0, 12.0]);
    }

    #[test]
    fn the_update_of_some_outputs_has_the_same_projection() {
        let (b, a) = ((0..8).map(|at| at as f32).collect(), vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        let bias = FactorBias { values: vec![10.0, 20.0, 30.0, 40.0], centre: Some(vec![7.0, 8.0]) };
        let plain = LowRank::new(4, 3, 2, b, a, ElementType::Bf16).with_bias(bias);
        let coded = LowRank::of_codes(FactorCodes { b: coded(4, 2, 0.1), a: coded(2, 3, 0.125) });
        for update in [plain, coded] {
            let part = update.of_outputs(1..3);
            assert_eq!((part.out_features(), part.in_features(), part.rank()), (2, 3, 2));
            assert_eq!((part.b(), part.a()), (&update.b()[2..6], update.a()));
            assert_eq!(part.factor_type(), update.factor_type());
            assert_eq!(part.bias().map(|bias| &bias.values[..]), update.bias().map(|bias| &bias.values[1..3]));
            assert_eq!(part.prefix(1), update.prefix(1).of_outputs(1..3));
            if let (Some(part), Some(whole)) = (part.codes(), update.codes()) {
                assert_eq!((part.b.to_f32(), &part.a), (update.of_outputs(1..3).b().to_vec(), &whole.a));
            }
            assert_eq!(update.of_outputs(0..4), update);
        }
    }

    fn coded(rows: usize, columns: usize, scale: f32) -> QuantizedMatrix {
        let codes = (0..rows * columns).map(|i| (i * 5 % 16) as u8).collect();
        let group_size = GroupSize::Columns(2);
        let scales = (0..rows * group_size.groups(columns)).map(|i| scale * (1 + i % 4) as f32).collect();
        let scale_type = ElementType::Bf16;
        let parts =
            QuantizedParts { rows, columns, bits: 4, group_size, codes, scales, scale_type, ..Default::default() };
        QuantizedMatrix::new(parts).unwrap()
    }

    #[test]
    fn prefixes_of_quantized_factors_are_prefixes_of_their_codes() {
        let factors = LowRank::of_codes(FactorCodes { b: coded(3, 5, 0.5), a: coded(5, 4, 0.125) });
        assert_eq!((factors.out_features(), factors.in_features(), factors.rank()), (3, 4, 5));
        assert_eq!((factors.factor_type(), factors.stored_bits()), (ElementType::Bf16, (15 + 20) * 4 + (9 + 10) * 16));
        assert_eq!(factors.projection_bits(), 20 * 4 + 10 * 16);
        for rank in 0..=5 {
            let prefix = factors.prefix(rank);
            let codes = prefix.codes().unwrap();
            assert_eq!((codes.b.to_f32().as_slice(), codes.a.to_f32().as_slice()), (prefix.b(), prefix.a()));
            assert_eq!(prefix.a(), &factors.a()[..rank * 4]);
        }
        for scaling in [0.5, -0.3] {
            let scaled = factors.scaled(scaling);
            let codes = scaled.codes().unwrap();
            assert_eq!(codes.b.codes(), factors.codes().unwrap().b.codes());
            assert_eq!(scaled.a(), factors.a());
            assert!(scaled.b().iter().zip(factors.b()).all(|(scaled, b)| (scaled - b * scaling).abs() < 1e-6));
            assert_eq!(codes.b.scale_type() == ElementType::Bf16, scaling == 0.5, "bf16 does not hold 0.3 · 0.5");
        }
        let inexact = LowRank::of_codes(FactorCodes { b: coded(2, 1, 0.1), a: coded(1, 2, 0.1) });
        assert_eq!(inexact.factor_type(), ElementType::F32, "bf16 does not hold 7 · 0.1");
    }
}
