use crate::vector::{LANES, Level, Vector};

/// A layer norm of one CPU level: x, weight, bias, epsilon, out.
pub(crate) type LayerNorm = unsafe fn(&[f32], &[f32], &[f32], f32, &mut [f32]);

/// `out = weight · x / √(mean(x²) + epsilon)`, row by row of `weight.len()` (RMSNorm, arXiv 1910.07467).
#[inline(always)]
pub(crate) fn rms_norm<L: Level>(level: L, x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
    let width = weight.len();
    for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
        let inverse = inverse_rms(level, x, epsilon);
        for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
            *out = x * inverse * weight;
        }
    }
}

/// [`rms_norm`] in place.
#[inline(always)]
pub(crate) fn rms_norm_assign<L: Level>(level: L, x: &mut [f32], weight: &[f32], epsilon: f32) {
    for x in x.chunks_exact_mut(weight.len()) {
        let inverse = inverse_rms(level, x, epsilon);
        for (x, weight) in x.iter_mut().zip(weight) {
            *x = *x * inverse * weight;
        }
    }
}

/// `out = weight · (x − mean(x)) / √(variance(x) + epsilon) + bias`, row by row of `weight.len()` (LayerNorm,
/// arXiv 1607.06450).
#[inline(always)]
pub(crate) fn layer_norm<L: Level>(level: L, x: &[f32], weight: &[f32], bias: &[f32], epsilon: f32, out: &mut [f32]) {
    let width = weight.len();
    for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
        let mean = fold(level, x, |sum, values| sum.add(values)) / width as f32;
        for (out, x) in out.iter_mut().zip(x) {
            *out = x - mean;
        }
        let inverse = inverse_rms(level, out, epsilon);
        for ((out, weight), bias) in out.iter_mut().zip(weight).zip(bias) {
            *out = *out * inverse * weight + bias;
        }
    }
}

#[inline(always)]
fn inverse_rms<L: Level>(level: L, x: &[f32], epsilon: f32) -> f32 {
    let squares = fold(level, x, |sum, values| values.mul_add(values, sum));
    1.0 / (squares / x.len() as f32 + epsilon).sqrt()
}

/// Folds `x` into a sum of 32 lanes, which are added at the end: the same order at every level.
#[inline(always)]
fn fold<L: Level>(level: L, x: &[f32], step: impl Fn(L::Vector, L::Vector) -> L::Vector) -> f32 {
    let (chunks, rest) = x.as_chunks::<LANES>();
    let mut sum = level.splat(0.0);
    for chunk in chunks {
        sum = step(sum, level.load(chunk));
    }
    if !rest.is_empty() {
        let mut padded = [0.0; LANES];
        padded[..rest.len()].copy_from_slice(rest);
        sum = step(sum, level.load(&padded));
    }
    sum.sum()
}
