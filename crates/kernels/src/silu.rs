use crate::vector::{LANES, Level, Vector, exp};

/// `out = silu(gate) · up` with `silu(x) = x / (1 + e^−x)`, element by element; `silu(x)` is zero below −88.73, where
/// it is smaller than 3e-37.
#[inline(always)]
pub(crate) fn silu_multiply<L: Level>(level: L, gate: &[f32], up: &[f32], out: &mut [f32]) {
    let (gates, gate_rest) = gate.as_chunks::<LANES>();
    let (ups, up_rest) = up.as_chunks::<LANES>();
    let (outs, out_rest) = out.as_chunks_mut::<LANES>();
    for ((gate, up), out) in gates.iter().zip(ups).zip(outs) {
        silu(level, level.load(gate)).mul(level.load(up)).store(out);
    }
    if !out_rest.is_empty() {
        let (mut gate, mut up, mut out) = ([0.0; LANES], [0.0; LANES], [0.0; LANES]);
        gate[..gate_rest.len()].copy_from_slice(gate_rest);
        up[..up_rest.len()].copy_from_slice(up_rest);
        silu(level, level.load(&gate)).mul(level.load(&up)).store(&mut out);
        out_rest.copy_from_slice(&out[..out_rest.len()]);
    }
}

#[inline(always)]
fn silu<L: Level>(level: L, x: L::Vector) -> L::Vector {
    // Minus infinity becomes a large number, whose quotient with e^−x = ∞ is the limit zero. NaN stays NaN.
    let x = level.splat(f32::MIN).max(x);
    let one = level.splat(1.0);
    x.div(one.add(exp(level, level.splat(0.0).sub(x))))
}
