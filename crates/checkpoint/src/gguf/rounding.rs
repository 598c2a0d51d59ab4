//! Scales, offsets and codes of one group of values that keep the sum of squared errors small.
//!
//! For given codes the best scale (and offset) is a least-squares fit, and for a given scale the best codes are the
//! nearest ones; from several starts the pair with the smallest error is taken, judged with scales as they are stored.

use half::f16;

/// How the scale of a group is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ScaleStorage {
    /// In half precision.
    Half,
    /// As a multiple of a common number, which is found afterwards. Offsets are then not positive.
    Multiple,
}

/// Starts: the largest value lies at the end of the grid, or this many steps beyond it.
const STARTS: [f32; 7] = [-0.9, -0.6, -0.3, 0.0, 0.3, 0.6, 0.9];

impl ScaleStorage {
    fn round(self, value: f32) -> f32 {
        match self {
            ScaleStorage::Half => nearest_half(value),
            ScaleStorage::Multiple => value,
        }
    }
}

/// The half-precision number next to `value`; the largest one for values beyond.
pub(crate) fn nearest_half(value: f32) -> f32 {
    f16::from_f32(value.clamp(f16::MIN.to_f32(), f16::MAX.to_f32())).to_f32()
}

/// Codes of `bits` bits such that `(code − 2^(bits−1)) · scale` is near `values`; gives the scale.
pub(crate) fn round_symmetric_group(values: &[f32], bits: u8, storage: ScaleStorage, codes: &mut [u8]) -> f32 {
    let zero = f32::from(1u8 << (bits - 1));
    let largest = values.iter().copied().max_by(|a, b| a.abs().total_cmp(&b.abs())).unwrap_or(0.0);
    codes.fill(zero as u8);
    if bits == 8 {
        // 256 steps leave nothing to search for.
        let scale = storage.round(largest.abs() / (zero - 1.0));
        assign(values, scale, -zero * scale, 255.0, codes);
        return if scale == 0.0 { 0.0 } else { scale };
    }
    let mut best = (f64::INFINITY, 0.0);
    let mut trial = vec![0; codes.len()];
    // The grid has one step more below zero, so the largest value comes there, or its opposite does.
    for end in [-zero, zero - 1.0] {
        for start in STARTS {
            let mut scale = storage.round(largest / (end + start * end.signum()));
            if scale == 0.0 {
                continue;
            }
            assign(values, scale, -zero * scale, 2.0 * zero - 1.0, &mut trial);
            let steps = |&code: &u8| f64::from(code) - f64::from(zero);
            let (product, square) = values.iter().zip(&trial).fold((0.0, 0.0), |(product, square), (&value, code)| {
                let step = steps(code);
                (product + f64::from(value) * step, square + step * step)
            });
            if square > 0.0 {
                let fitted = storage.round((product / square) as f32);
                scale = if fitted == 0.0 { scale } else { fitted };
                assign(values, scale, -zero * scale, 2.0 * zero - 1.0, &mut trial);
            }
            let error = squared_error(values, scale, -zero * scale, &trial);
            if error < best.0 {
                best = (error, scale);
                codes.copy_from_slice(&trial);
            }
        }
    }
    best.1
}

/// Codes of `bits` bits such that `code · scale + offset` is near `values`; gives scale and offset.
pub(crate) fn round_offset_group(values: &[f32], bits: u8, storage: ScaleStorage, codes: &mut [u8]) -> (f32, f32) {
    let most = f32::from((1u16 << bits) - 1);
    let limited = |offset: f32| if storage == ScaleStorage::Multiple { offset.min(0.0) } else { offset };
    let lowest = limited(values.iter().copied().fold(f32::INFINITY, f32::min));
    let highest = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    codes.fill(0);
    let flat = storage.round(lowest);
    let mut best = (squared_error(values, 0.0, flat, codes), 0.0, flat);
    let mut trial = vec![0; codes.len()];
    for start in STARTS {
        let mut scale = storage.round((highest - lowest) / (most + start));
        let mut offset = storage.round(lowest);
        if scale <= 0.0 {
            continue;
        }
        assign(values, scale, offset, most, &mut trial);
        if let Some((fitted_scale, fitted_offset)) = fit(values, &trial, storage) {
            let fitted = (storage.round(fitted_scale), storage.round(fitted_offset));
            if fitted.0 > 0.0 {
                (scale, offset) = fitted;
                assign(values, scale, offset, most, &mut trial);
            }
        }
        let error = squared_error(values, scale, offset, &trial);
        if error < best.0 {
            best = (error, scale, offset);
            codes.copy_from_slice(&trial);
        }
    }
    (best.1, best.2)
}

/// The nearest codes.
fn assign(values: &[f32], scale: f32, offset: f32, most: f32, codes: &mut [u8]) {
    if scale == 0.0 {
        return;
    }
    for (code, &value) in codes.iter_mut().zip(values) {
        *code = ((value - offset) / scale).round_ties_even().clamp(0.0, most) as u8;
    }
}

/// The line through codes and values with the smallest squared error.
fn fit(values: &[f32], codes: &[u8], storage: ScaleStorage) -> Option<(f32, f32)> {
    let count = values.len() as f64;
    let mut sums = [0f64; 4];
    for (&value, &code) in values.iter().zip(codes) {
        let (value, code) = (f64::from(value), f64::from(code));
        for (sum, term) in sums.iter_mut().zip([value, code, code * code, code * value]) {
            *sum += term;
        }
    }
    let [value, code, square, product] = sums;
    let spread = count * square - code * code;
    if spread <= 0.0 {
        return None;
    }
    let scale = (count * product - code * value) / spread;
    let offset = (value - scale * code) / count;
    if storage == ScaleStorage::Multiple && offset > 0.0 {
        return (square > 0.0).then(|| ((product / square) as f32, 0.0));
    }
    Some((scale as f32, offset as f32))
}

fn squared_error(values: &[f32], scale: f32, offset: f32, codes: &[u8]) -> f64 {
    let error = |(&value, &code): (&f32, &u8)| {
        let error = f64::from(value) - (f64::from(code) * f64::from(scale) + f64::from(offset));
        error * error
    };
    values.iter().zip(codes).map(error).sum()
}
