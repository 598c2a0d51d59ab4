use std::cmp::Ordering;

use half::{bf16, f16};
use kintsugi_runtime::{Error, ErrorCode, Result};
use kintsugi_weights::{DenseMatrix, DenseValues, ElementType, LowRank};

/// The factors of one adapter for a Linear, as its file holds them.
#[derive(Debug)]
pub struct StoredSource {
    /// `[rank, in]`.
    pub a: DenseMatrix,
    /// `[out, rank]`.
    pub b: DenseMatrix,
    /// What the adapter multiplies B A with.
    pub scaling: f64,
    /// What the user multiplies the update of the adapter with.
    pub weight: f64,
}

impl StoredSource {
    /// The factors as f32; a pair of two types counts as f32.
    pub fn to_low_rank(&self) -> LowRank {
        let (a, b) = (&self.a, &self.b);
        let factor_type = if a.element_type() == b.element_type() { a.element_type() } else { ElementType::F32 };
        LowRank::new(b.rows(), a.columns(), a.rows(), b.to_f32(), a.to_f32(), factor_type)
    }
}

/// [`crate::Cat`] without a detour through f32, for factors that are stored in `element_type` already: the same numbers,
/// bit for bit. B is moved; A is moved where weight times scaling is 1, else each value is multiplied in f64 and
/// rounded. `None` where a factor has another type.
///
/// # Errors
/// `ERR_VALUE_NOT_FINITE` when the type cannot hold a product.
///
/// # Panics
/// When there are no sources or their shapes differ.
pub fn concatenate_stored(
    name: &str,
    sources: &[StoredSource],
    element_type: ElementType,
) -> Result<Option<[DenseMatrix; 2]>> {
    macro_rules! of_type {
        ($variant:ident, $type:ty) => {{
            let parts: Option<Vec<Part<'_, $type>>> = sources
                .iter()
                .map(|source| match (source.a.values(), source.b.values()) {
                    (DenseValues::$variant(a), DenseValues::$variant(b)) => Some(Part::new(source, a, b)),
                    _ => None,
                })
                .collect();
            parts.map(|parts| {
                let (in_features, out_features) = (sources[0].a.columns(), sources[0].b.rows());
                let (rank, a, b) = concatenate(parts, in_features, out_features);
                [
                    DenseMatrix::new(rank, in_features, DenseValues::$variant(a)),
                    DenseMatrix::new(out_features, rank, DenseValues::$variant(b)),
                ]
            })
        }};
    }
    let factors = match element_type {
        ElementType::F32 => of_type!(F32, f32),
        ElementType::F16 => of_type!(F16, f16),
        ElementType::Bf16 => of_type!(Bf16, bf16),
    };
    match factors {
        // What was read is finite: only products can be anything else.
        Some([a, _]) if a.first_not_finite().is_some() => Err(beyond(name, element_type)),
        factors => Ok(factors),
    }
}

/// The error for factors that the stored type cannot hold.
pub(crate) fn beyond(name: &str, element_type: ElementType) -> Error {
    let message = format!("the merged factors have values that {} cannot hold", element_type.name());
    Error::new(ErrorCode::ValueNotFinite, message)
        .subject(name)
        .hint("Store the factors as bf16 or f32, or give smaller weights")
}

/// A number type of factors.
trait Stored: Copy {
    fn wide(self) -> f32;
    fn narrow(value: f32) -> Self;
}

impl Stored for f32 {
    fn wide(self) -> f32 {
        self
    }
    fn narrow(value: f32) -> Self {
        value
    }
}

impl Stored for f16 {
    fn wide(self) -> f32 {
        self.to_f32()
    }
    fn narrow(value: f32) -> Self {
        f16::from_f32(value)
    }
}

impl Stored for bf16 {
    fn wide(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    /// To the nearest, ties to even; the values here are no NaN.
    fn narrow(value: f32) -> Self {
        let bits = value.to_bits();
        bf16::from_bits((bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16)
    }
}

/// One source and the order of its units.
struct Part<'a, T> {
    source: &'a StoredSource,
    a: &'a [T],
    b: &'a [T],
    order: Vec<usize>,
}

impl<'a, T: Stored> Part<'a, T> {
    fn new(source: &'a StoredSource, a: &'a [T], b: &'a [T]) -> Self {
        let (rank, width) = (source.a.rows(), source.a.columns());
        let row = |unit: usize| &a[unit * width..(unit + 1) * width];
        let column = |unit: usize| b.iter().skip(unit).step_by(rank);
        let mut order: Vec<usize> = (0..rank).collect();
        order.sort_by(|&i, &j| compare(row(i), row(j)).then_with(|| compare(column(i), column(j))));
        Part { source, a, b, order }
    }

    /// The order of [`crate::LinearSources`].
    fn by_content(&self, other: &Self) -> Ordering {
        (self.order.len().cmp(&other.order.len()))
            .then(self.source.weight.total_cmp(&other.source.weight))
            .then(self.source.scaling.total_cmp(&other.source.scaling))
            .then_with(|| compare(self.a, other.a))
            .then_with(|| compare(self.b, other.b))
    }
}

fn compare<'a, T: Stored + 'a>(
    left: impl IntoIterator<Item = &'a T>,
    right: impl IntoIterator<Item = &'a T>,
) -> Ordering {
    let mut pairs = left.into_iter().zip(right).map(|(left, right)| left.wide().total_cmp(&right.wide()));
    pairs.find(|order| order.is_ne()).unwrap_or(Ordering::Equal)
}

/// Rank, A `[rank, in]` and B `[out, rank]` of all parts.
fn concatenate<T: Stored>(
    mut parts: Vec<Part<'_, T>>,
    in_features: usize,
    out_features: usize,
) -> (usize, Vec<T>, Vec<T>) {
    parts.sort_by(Part::by_content);
    let rank = parts.iter().map(|part| part.order.len()).sum();
    let mut a = Vec::with_capacity(rank * in_features);
    for part in &parts {
        let coefficient = part.source.weight * part.source.scaling;
        for &unit in &part.order {
            let row = &part.a[unit * in_features..(unit + 1) * in_features];
            if coefficient == 1.0 {
                a.extend_from_slice(row);
            } else {
                a.extend(row.iter().map(|value| T::narrow((f64::from(value.wide()) * coefficient) as f32)));
            }
        }
    }
    let mut b = Vec::with_capacity(rank * out_features);
    for i in 0..out_features {
        for part in &parts {
            let row = &part.b[i * part.order.len()..(i + 1) * part.order.len()];
            b.extend(part.order.iter().map(|&unit| row[unit]));
        }
    }
    (rank, a, b)
}

#[cfg(test)]
mod tests {
    use kintsugi_runtime::ThreadPool;
    use kintsugi_testkit::Random;

    use super::*;
    use crate::{Cat, LinearSources, MergeOptions, MergeSource, merge_linear};

    fn matrix(rows: usize, columns: usize, element_type: ElementType, random: &mut Random) -> DenseMatrix {
        let values: Vec<f32> = (0..rows * columns).map(|_| element_type.round(random.normal() as f32)).collect();
        DenseMatrix::new(
            rows,
            columns,
            match element_type {
                ElementType::F32 => DenseValues::F32(values),
                ElementType::F16 => DenseValues::F16(values.iter().map(|&value| f16::from_f32(value)).collect()),
                ElementType::Bf16 => DenseValues::Bf16(values.iter().map(|&value| bf16::from_f32(value)).collect()),
            },
        )
    }

    #[test]
    fn the_numbers_are_those_of_the_way_through_f32() {
        let (out, input) = (7, 9);
        for element_type in ElementType::ALL {
            let mut random = Random::new(5);
            let mut source = |rank, scaling, weight| StoredSource {
                a: matrix(rank, input, element_type, &mut random),
                b: matrix(out, rank, element_type, &mut random),
                scaling,
                weight,
            };
            let mut sources =
                vec![source(3, 2.0, 0.5), source(4, 4.0 / 3.0, -0.7), source(3, 1.0, 1.0), source(1, 2.0, 1e-6)];
            for _ in 0..2 {
                let [a, b] = concatenate_stored("q_proj", &sources, element_type).unwrap().unwrap();
                let factors: Vec<LowRank> = sources
                    .iter()
                    .map(|s| LowRank::new(out, input, s.a.rows(), s.b.to_f32(), s.a.to_f32(), element_type))
                    .collect();
                let plain: Vec<MergeSource<'_>> = sources
                    .iter()
                    .zip(&factors)
                    .map(|(s, factors)| MergeSource { factors, scaling: s.scaling, weight: s.weight })
                    .collect();
                let linear = LinearSources::new("q_proj", &plain, plain.len()).unwrap();
                let options = MergeOptions { factor_type: element_type, ..Default::default() };
                let expected = merge_linear(&Cat, &linear, &options, &ThreadPool::with_threads(1)).unwrap();
                let expected = expected.factors.unwrap();
                assert_eq!((a.to_f32().as_slice(), b.to_f32().as_slice()), (expected.a(), expected.b()));
                sources.reverse();
            }
            let other = if element_type == ElementType::F32 { ElementType::F16 } else { ElementType::F32 };
            assert!(concatenate_stored("q_proj", &sources, other).unwrap().is_none());
            sources[0].weight = 1e39;
            let error = concatenate_stored("q_proj", &sources, element_type).unwrap_err();
            assert_eq!((error.code, error.subject.as_str()), (ErrorCode::ValueNotFinite, "q_proj"));
        }
    }

    #[test]
    fn bf16_is_rounded_as_the_library_rounds() {
        let mut random = Random::new(8);
        for _ in 0..20_000 {
            let value = f32::from_bits(random.bits() as u32);
            if !value.is_nan() {
                assert_eq!(<bf16 as Stored>::narrow(value).to_bits(), bf16::from_f32(value).to_bits(), "{value:e}");
            }
        }
        for bits in [0x3f80_8000, 0x3f81_8000, 0x7f7f_ffff, 0x8000_0000, 0x0000_8000, 0x0001_8000u32] {
            let value = f32::from_bits(bits);
            assert_eq!(<bf16 as Stored>::narrow(value), bf16::from_f32(value));
        }
    }
}
