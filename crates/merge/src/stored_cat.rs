use std::cmp::Ordering;

use bytemuck::{Pod, Zeroable};
use half::{bf16, f16};
use kintsugi_runtime::{Error, ErrorCode, Result, ThreadPool};
use kintsugi_weights::{ElementType, StoredRows};

/// Bytes of A or B that are made at one time.
const BAND_BYTES: usize = 1 << 20;
/// Rows of B that a thread puts together at one time.
const ROWS_PER_TASK: usize = 64;

/// The factors of one adapter for a Linear, as its file holds them.
#[derive(Clone, Copy)]
pub struct StoredSource<'a> {
    /// `[rank, in]`.
    pub a: &'a dyn StoredRows,
    /// `[out, rank]`.
    pub b: &'a dyn StoredRows,
    /// What the adapter multiplies B A with.
    pub scaling: f64,
    /// What the user multiplies the update of the adapter with.
    pub weight: f64,
}

/// [`crate::Cat`] from file to file, for factors that are stored in `element_type` already: the same numbers, bit for
/// bit, without a detour through f32. B is moved; A is moved where weight times scaling is 1, else each value is
/// multiplied in f64 and rounded.
///
/// `put` is given the bytes of A `[rank, in]` and then those of B `[out, rank]`, piece by piece. In memory are all of A
/// and bands of B, in buffers that stay from one Linear to the next; all of B only where units or sources have equal A,
/// whose order B decides.
#[derive(Debug, Default)]
pub struct StoredCat {
    /// A of each source.
    a: Vec<Vec<u64>>,
    /// A band of B of each source.
    b: Vec<Vec<u64>>,
    /// Rows of the result.
    out: Vec<u64>,
}

impl StoredCat {
    /// Nothing in its buffers.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether these sources can be concatenated in this type.
    pub fn fits(sources: &[StoredSource<'_>], element_type: ElementType) -> bool {
        sources.iter().all(|source| [source.a, source.b].iter().all(|factor| factor.element_type() == element_type))
    }

    /// Concatenates the sources of the Linear `name`.
    ///
    /// # Errors
    /// `ERR_VALUE_NOT_FINITE` when the type cannot hold a product; what reading and `put` report.
    ///
    /// # Panics
    /// When there are no sources, they do not fit, or their shapes differ.
    pub fn concatenate(
        &mut self,
        name: &str,
        sources: &[StoredSource<'_>],
        element_type: ElementType,
        pool: &ThreadPool,
        put: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        assert!(Self::fits(sources, element_type), "factors of {name} have another type");
        match element_type {
            ElementType::F32 => self.concatenate_as::<f32>(name, sources, pool, put),
            ElementType::F16 => self.concatenate_as::<f16>(name, sources, pool, put),
            ElementType::Bf16 => self.concatenate_as::<bf16>(name, sources, pool, put),
        }
    }

    fn concatenate_as<T: Stored>(
        &mut self,
        name: &str,
        sources: &[StoredSource<'_>],
        pool: &ThreadPool,
        put: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let (in_features, out_features) = (sources[0].a.columns(), sources[0].b.rows());
        if self.a.len() < sources.len() {
            self.a.resize_with(sources.len(), Vec::new);
            self.b.resize_with(sources.len(), Vec::new);
        }
        let mut parts = Vec::with_capacity(sources.len());
        for (source, buffer) in sources.iter().zip(&mut self.a) {
            let a = values_of::<T>(buffer, source.a.rows() * in_features);
            source.a.read_rows(0, bytemuck::cast_slice_mut(a))?;
            parts.push(Part::new(*source, a)?);
        }
        sort_by_content(&mut parts)?;

        let band = (BAND_BYTES / (in_features * size_of::<T>())).max(1);
        for part in &parts {
            let coefficient = part.source.weight * part.source.scaling;
            if coefficient == 1.0 {
                part.order.iter().try_for_each(|&unit| put(bytemuck::cast_slice(part.row(unit))))?;
                continue;
            }
            for units in part.order.chunks(band) {
                let products = values_of::<T>(&mut self.out, units.len() * in_features);
                pool.for_each_chunk(products, in_features, |i, row| {
                    for (product, value) in row.iter_mut().zip(part.row(units[i])) {
                        *product = T::narrow((f64::from(value.wide()) * coefficient) as f32);
                    }
                });
                let bytes: &[u8] = bytemuck::cast_slice(products);
                // What was read is finite: only products can be anything else.
                if T::TYPE.first_not_finite(bytes).is_some() {
                    return Err(beyond(name, T::TYPE));
                }
                put(bytes)?;
            }
        }

        let rank: usize = parts.iter().map(|part| part.order.len()).sum();
        let band = (BAND_BYTES / (rank * size_of::<T>())).clamp(1, out_features);
        for first in (0..out_features).step_by(band) {
            let rows = band.min(out_features - first);
            for (part, buffer) in parts.iter().zip(&mut self.b) {
                let values = values_of::<T>(buffer, rows * part.order.len());
                part.source.b.read_rows(first, bytemuck::cast_slice_mut(values))?;
            }
            let out = values_of::<T>(&mut self.out, rows * rank);
            let bands: Vec<&[T]> = self.b.iter().map(|buffer| bytemuck::cast_slice(buffer)).collect();
            pool.for_each_chunk(out, rank * ROWS_PER_TASK, |task, out| {
                for (i, out) in (task * ROWS_PER_TASK..).zip(out.chunks_exact_mut(rank)) {
                    let mut start = 0;
                    for (part, band) in parts.iter().zip(&bands) {
                        let width = part.order.len();
                        let row = &band[i * width..(i + 1) * width];
                        out[start..start + width].iter_mut().zip(&part.order).for_each(|(to, &unit)| *to = row[unit]);
                        start += width;
                    }
                }
            });
            put(bytemuck::cast_slice(out))?;
        }
        Ok(())
    }
}

/// The first `count` values of a buffer, which grows to hold them.
fn values_of<T: Stored>(buffer: &mut Vec<u64>, count: usize) -> &mut [T] {
    let words = (count * size_of::<T>()).div_ceil(size_of::<u64>());
    if buffer.len() < words {
        buffer.resize(words, 0);
    }
    &mut bytemuck::cast_slice_mut(buffer.as_mut_slice())[..count]
}

/// The error for factors that the stored type cannot hold.
pub(crate) fn beyond(name: &str, element_type: ElementType) -> Error {
    let message = format!("the merged factors have values that {} cannot hold", element_type.name());
    Error::new(ErrorCode::ValueNotFinite, message)
        .subject(name)
        .hint("Store the factors as bf16 or f32, or give smaller weights")
}

/// A number type of factors.
trait Stored: Pod + Zeroable + Send + Sync {
    const TYPE: ElementType;
    fn wide(self) -> f32;
    fn narrow(value: f32) -> Self;
}

impl Stored for f32 {
    const TYPE: ElementType = ElementType::F32;
    fn wide(self) -> f32 {
        self
    }
    fn narrow(value: f32) -> Self {
        value
    }
}

impl Stored for f16 {
    const TYPE: ElementType = ElementType::F16;
    fn wide(self) -> f32 {
        self.to_f32()
    }
    fn narrow(value: f32) -> Self {
        f16::from_f32(value)
    }
}

impl Stored for bf16 {
    const TYPE: ElementType = ElementType::Bf16;
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
    source: StoredSource<'a>,
    a: &'a [T],
    /// All of B, where A does not decide an order.
    b: Vec<T>,
    order: Vec<usize>,
}

impl<'a, T: Stored> Part<'a, T> {
    fn new(source: StoredSource<'a>, a: &'a [T]) -> Result<Self> {
        let mut part = Part { source, a, b: Vec::new(), order: (0..source.a.rows()).collect() };
        let mut order = std::mem::take(&mut part.order);
        order.sort_by(|&i, &j| compare(part.row(i), part.row(j)));
        if order.windows(2).any(|pair| compare(part.row(pair[0]), part.row(pair[1])).is_eq()) {
            part.read_b()?;
            order.sort_by(|&i, &j| {
                compare(part.row(i), part.row(j)).then_with(|| compare(part.column(i), part.column(j)))
            });
        }
        Ok(Part { order, ..part })
    }

    fn row(&self, unit: usize) -> &[T] {
        let width = self.source.a.columns();
        &self.a[unit * width..(unit + 1) * width]
    }

    fn column(&self, unit: usize) -> impl Iterator<Item = &T> {
        self.b.iter().skip(unit).step_by(self.source.b.columns())
    }

    fn read_b(&mut self) -> Result<()> {
        self.b = vec![T::zeroed(); self.source.b.rows() * self.source.b.columns()];
        self.source.b.read_rows(0, bytemuck::cast_slice_mut(&mut self.b))
    }

    /// The order of [`crate::LinearSources`], as far as the parts have read.
    fn by_content(&self, other: &Self) -> Ordering {
        (self.a.len().cmp(&other.a.len()))
            .then(self.source.weight.total_cmp(&other.source.weight))
            .then(self.source.scaling.total_cmp(&other.source.scaling))
            .then_with(|| compare(self.a, other.a))
            .then_with(|| compare(&self.b, &other.b))
    }
}

/// Sorts by weights, scalings, A, and where these are equal by B. Parts with equal A have all read B before or none, so
/// that this is an order.
fn sort_by_content<T: Stored>(parts: &mut [Part<'_, T>]) -> Result<()> {
    parts.sort_by(Part::by_content);
    for equal in parts.chunk_by_mut(|left, right| left.by_content(right).is_eq()) {
        if equal.len() > 1 {
            equal.iter_mut().try_for_each(Part::read_b)?;
            equal.sort_by(Part::by_content);
        }
    }
    Ok(())
}

fn compare<'a, T: Stored>(left: impl IntoIterator<Item = &'a T>, right: impl IntoIterator<Item = &'a T>) -> Ordering {
    let mut pairs = left.into_iter().zip(right).map(|(left, right)| left.wide().total_cmp(&right.wide()));
    pairs.find(|order| order.is_ne()).unwrap_or(Ordering::Equal)
}

#[cfg(test)]
mod tests {
    use kintsugi_testkit::Random;
    use kintsugi_weights::{DenseMatrix, DenseValues, LowRank};

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

    /// A source that owns its factors.
    struct Owned {
        a: DenseMatrix,
        b: DenseMatrix,
        scaling: f64,
        weight: f64,
    }

    fn concatenated(cat: &mut StoredCat, sources: &[Owned], element_type: ElementType) -> Result<Vec<f32>> {
        let sources: Vec<StoredSource<'_>> = sources
            .iter()
            .map(|Owned { a, b, scaling, weight }| StoredSource { a, b, scaling: *scaling, weight: *weight })
            .collect();
        let mut bytes = Vec::new();
        cat.concatenate("q_proj", &sources, element_type, &ThreadPool::with_threads(2), &mut |piece| {
            bytes.extend_from_slice(piece);
            Ok(())
        })?;
        Ok(element_type.widen(&bytes))
    }

    /// A and B behind each other, by the method that holds everything as f32.
    fn expected(sources: &[Owned], element_type: ElementType) -> Vec<f32> {
        let factors: Vec<LowRank> = sources
            .iter()
            .map(|s| LowRank::new(s.b.rows(), s.a.columns(), s.a.rows(), s.b.to_f32(), s.a.to_f32(), element_type))
            .collect();
        let plain: Vec<MergeSource<'_>> = sources
            .iter()
            .zip(&factors)
            .map(|(s, factors)| MergeSource { factors, scaling: s.scaling, weight: s.weight })
            .collect();
        let linear = LinearSources::new("q_proj", &plain, plain.len()).unwrap();
        let options = MergeOptions { factor_type: element_type, ..Default::default() };
        let found = merge_linear(&Cat, &linear, &options, &ThreadPool::with_threads(1)).unwrap().factors.unwrap();
        [found.a(), found.b()].concat()
    }

    #[test]
    fn the_numbers_are_those_of_the_way_through_f32() {
        for element_type in ElementType::ALL {
            // One buffer for shapes that grow and shrink; B of 200,000 rows comes in several bands.
            let mut cat = StoredCat::new();
            for (out, input) in [(7, 9), (200_000, 1), (5, 40)] {
                let mut random = Random::new(5);
                let mut source = |rank, scaling, weight| Owned {
                    a: matrix(rank, input, element_type, &mut random),
                    b: matrix(out, rank, element_type, &mut random),
                    scaling,
                    weight,
                };
                let mut sources =
                    vec![source(3, 2.0, 0.5), source(4, 4.0 / 3.0, -0.7), source(3, 1.0, 1.0), source(1, 2.0, 1e-6)];
                for _ in 0..2 {
                    let found = concatenated(&mut cat, &sources, element_type).unwrap();
                    assert!(found == expected(&sources, element_type), "{out} × {input}, {}", element_type.name());
                    sources.reverse();
                }
                sources[0].weight = 1e39;
                let error = concatenated(&mut cat, &sources, element_type).unwrap_err();
                assert_eq!((error.code, error.subject.as_str()), (ErrorCode::ValueNotFinite, "q_proj"));
            }
        }
    }

    #[test]
    fn units_and_sources_with_equal_a_are_ordered_by_b() {
        let (out, input, rank) = (6, 4, 3);
        let mut random = Random::new(9);
        let a = DenseMatrix::from_f32(rank, input, [1.0f32, -2.0, 0.5, 3.0].repeat(rank));
        let single = DenseMatrix::from_f32(1, input, vec![1.0, -2.0, 0.5, 3.0]);
        let mut source = |a: &DenseMatrix| Owned {
            a: a.clone(),
            b: matrix(out, a.rows(), ElementType::F32, &mut random),
            scaling: 1.0,
            weight: 1.0,
        };
        let mut sources = vec![source(&a), source(&single), source(&a), source(&single), source(&a)];
        let whole = expected(&sources, ElementType::F32);
        for _ in 0..sources.len() {
            assert_eq!(concatenated(&mut StoredCat::new(), &sources, ElementType::F32).unwrap(), whole);
            sources.rotate_left(1);
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
