use crate::vector::{LANES, Level, Vector};

/// `out = weight · x / √(mean(x²) + epsilon)`, row by row of `weight.len()` (RMSNorm, arXiv 1910.07467).
///
/// The squares are summed in 32 lanes that are folded at the end: the same order at every level.
#[inline(always)]
pub(crate) fn rms_norm<L: Level>(level: L, x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
    let width = weight.len();
    for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
        let (chunks, rest) = x.as_chunks::<LANES>();
        let mut squares = level.splat(0.0);
        for chunk in chunks {
            let values = level.load(chunk);
            squares = values.mul_add(values, squares);
        }
        if !rest.is_empty() {
            let mut padded = [0.0; LANES];
            padded[..rest.len()].copy_from_slice(rest);
            let values = level.load(&padded);
            squares = values.mul_add(values, squares);
        }
        let inverse = 1.0 / (squares.sum() / width as f32 + epsilon).sqrt();
        for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
            *out = x * inverse * weight;
        }
    }
}
