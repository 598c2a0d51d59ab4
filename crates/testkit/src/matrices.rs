//! Weights and activations as models have them, and worse ones.

use kintsugi_weights::{ElementType, GroupSize, QuantizedMatrix, QuantizedParts};

use crate::Random;

/// Weights like those of a trained Linear, `[rows, columns]`: normal, with rows of different size and a few columns
/// that are much larger.
pub fn weights(seed: u64, rows: usize, columns: usize) -> Vec<f32> {
    let mut random = Random::new(seed);
    let column_sizes: Vec<f64> = (0..columns).map(|i| if i % 41 == 40 { 8.0 } else { 1.0 }).collect();
    let mut values = Vec::with_capacity(rows * columns);
    for _ in 0..rows {
        let row_size = 0.02 * (0.5 * random.normal()).exp();
        values.extend(column_sizes.iter().map(|size| (random.normal() * size * row_size) as f32));
    }
    values
}

/// Activations like those inside of a decoder, `[count, columns]`: channels whose sizes fall as a power law, and
/// every 37th thirty times as large.
pub fn activations(seed: u64, count: usize, columns: usize) -> Vec<f32> {
    let mut random = Random::new(seed ^ 0x5eed);
    let mut values = Vec::with_capacity(count * columns);
    for _ in 0..count {
        values.extend((0..columns).map(|i| {
            let outlier = if i % 37 == 36 { 30.0 } else { 1.0 };
            (random.normal() * outlier / (1.0 + i as f64).powf(0.3)) as f32
        }));
    }
    values
}

/// A random matrix on an integer grid. Codes are evenly spread, zero points lie around the middle of the range, and
/// a group index, if asked for, deals the columns out as evenly as activation order does.
///
/// # Panics
/// When `bits` is not a width that integer grids have.
pub fn quantized(
    seed: u64,
    rows: usize,
    columns: usize,
    bits: u8,
    group_size: GroupSize,
    symmetric: bool,
    scale_type: ElementType,
    group_index: bool,
) -> QuantizedMatrix {
    let mut random = Random::new(seed);
    let groups = group_size.groups(columns);
    let range = 1usize << bits;
    let codes = (0..rows * columns).map(|_| random.below(range) as u8).collect();
    let scales = (0..rows * groups)
        .map(|_| scale_type.round((0.04 / range as f64 * (0.5 * random.normal()).exp()) as f32))
        .collect();
    let zero_points = (!symmetric)
        .then(|| (0..rows * groups).map(|_| (range / 4 + random.below(range / 2 + 1)).min(range - 1) as u8).collect());
    let group_index = group_index.then(|| {
        let width = group_size.columns(columns);
        let mut index: Vec<u32> = (0..columns).map(|column| (column / width) as u32).collect();
        for i in (1..columns).rev() {
            index.swap(i, random.below(i + 1));
        }
        index
    });
    QuantizedMatrix::new(QuantizedParts {
        rows,
        columns,
        bits,
        group_size,
        codes,
        scales,
        scale_type,
        zero_points,
        group_index,
        ..QuantizedParts::default()
    })
    .expect("the parts are made to fit")
}
