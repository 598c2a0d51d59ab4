use crate::vector::{LANES, Level, Vector, exp};

/// The function between two Linears of an MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Activation {
    /// `silu(x) = x / (1 + e^−x)`.
    Silu,
    /// `gelu(x) = x · Φ(x)` with the distribution function Φ of the normal distribution.
    Gelu,
    /// `x / (1 + e^−2u)`, `u = √(2/π) · (x + 0.044715 x³)`: the approximation of gelu by tanh.
    GeluTanh,
}

/// A function of one CPU level for an [`Activation`] of each element.
pub(crate) type Activate = unsafe fn(&[f32], &mut [f32]);

/// The same times the element of a second slice.
pub(crate) type ActivateMultiply = unsafe fn(&[f32], &[f32], &mut [f32]);

/// A function of each lane.
pub(crate) trait Lanewise {
    fn apply<L: Level>(level: L, x: L::Vector) -> L::Vector;
}

pub(crate) struct Silu;
pub(crate) struct Gelu;
pub(crate) struct GeluTanh;

impl Lanewise for Silu {
    /// Zero below −88.73, where it is smaller than 3e-37.
    #[inline(always)]
    fn apply<L: Level>(level: L, x: L::Vector) -> L::Vector {
        let x = finite_below(level, x);
        divide_by_one_plus_exp(level, x, level.splat(0.0).sub(x))
    }
}

impl Lanewise for GeluTanh {
    /// Zero where it is smaller than 3e-37.
    #[inline(always)]
    fn apply<L: Level>(level: L, x: L::Vector) -> L::Vector {
        /// −2·√(2/π).
        const SLOPE: f32 = -1.595_769_2;
        const CUBIC: f32 = 0.044_715;
        let x = finite_below(level, x);
        let inner = x.mul(x).mul(level.splat(CUBIC * SLOPE)).add(level.splat(SLOPE));
        divide_by_one_plus_exp(level, x, inner.mul(x))
    }
}

impl Lanewise for Gelu {
    /// `max(x, 0) − |x| · erfc(|x|/√2) / 2`, with erfc by a Chebyshev fit of relative error 1.2e-7 (Numerical Recipes,
    /// §6.2).
    #[inline(always)]
    fn apply<L: Level>(level: L, x: L::Vector) -> L::Vector {
        const FIT: [f32; 10] = [
            0.170_872_77,
            -0.822_152_23,
            1.488_515_9,
            -1.135_204,
            0.278_868_07,
            -0.186_288_06,
            0.096_784_18,
            0.374_091_96,
            1.000_023_7,
            -1.265_512_2,
        ];
        let zero = level.splat(0.0);
        let magnitude = zero.sub(x).max(x);
        // Beyond it erfc is zero, and an infinity times zero would not be.
        let z = level.splat(30.0).min(magnitude).mul(level.splat(std::f32::consts::FRAC_1_SQRT_2));
        let t = level.splat(1.0).div(z.mul_add(level.splat(0.5), level.splat(1.0)));
        let mut fit = level.splat(FIT[0]);
        for coefficient in &FIT[1..] {
            fit = fit.mul_add(t, level.splat(*coefficient));
        }
        let erfc = exp(level, zero.sub(z).mul_add(z, fit)).mul(t);
        let tail = level.splat(30.0).min(magnitude).mul(erfc).mul(level.splat(0.5));
        zero.max(x).sub(tail)
    }
}

/// `out = activation(gate) · up`, element by element.
#[inline(always)]
pub(crate) fn multiply<L: Level, F: Lanewise>(level: L, gate: &[f32], up: &[f32], out: &mut [f32]) {
    let (gates, gate_rest) = gate.as_chunks::<LANES>();
    let (ups, up_rest) = up.as_chunks::<LANES>();
    let (outs, out_rest) = out.as_chunks_mut::<LANES>();
    for ((gate, up), out) in gates.iter().zip(ups).zip(outs) {
        F::apply(level, level.load(gate)).mul(level.load(up)).store(out);
    }
    if !out_rest.is_empty() {
        let (mut gate, mut up, mut out) = ([0.0; LANES], [0.0; LANES], [0.0; LANES]);
        gate[..gate_rest.len()].copy_from_slice(gate_rest);
        up[..up_rest.len()].copy_from_slice(up_rest);
        F::apply(level, level.load(&gate)).mul(level.load(&up)).store(&mut out);
        out_rest.copy_from_slice(&out[..out_rest.len()]);
    }
}

/// `out = activation(x)`, element by element.
#[inline(always)]
pub(crate) fn activate<L: Level, F: Lanewise>(level: L, x: &[f32], out: &mut [f32]) {
    let (chunks, rest) = x.as_chunks::<LANES>();
    let (outs, out_rest) = out.as_chunks_mut::<LANES>();
    for (x, out) in chunks.iter().zip(outs) {
        F::apply(level, level.load(x)).store(out);
    }
    if !out_rest.is_empty() {
        let (mut x, mut out) = ([0.0; LANES], [0.0; LANES]);
        x[..rest.len()].copy_from_slice(rest);
        F::apply(level, level.load(&x)).store(&mut out);
        out_rest.copy_from_slice(&out[..out_rest.len()]);
    }
}

/// `x = cap · tanh(x / cap)` in place, element by element.
#[inline(always)]
pub(crate) fn soft_cap<L: Level>(level: L, cap: f32, x: &mut [f32]) {
    let (chunks, rest) = x.as_chunks_mut::<LANES>();
    for x in chunks {
        cap_lanes(level, level.load(x), cap).store(x);
    }
    if !rest.is_empty() {
        let mut padded = [0.0; LANES];
        padded[..rest.len()].copy_from_slice(rest);
        cap_lanes(level, level.load(&padded), cap).store(&mut padded);
        rest.copy_from_slice(&padded[..rest.len()]);
    }
}

/// `cap · tanh(x / cap)` of each lane.
///
/// `tanh(y) = (e^2y − 1) / (e^2y + 1)`, where `e^2y − 1` is taken without cancellation.
#[inline(always)]
pub(crate) fn cap_lanes<L: Level>(level: L, x: L::Vector, cap: f32) -> L::Vector {
    // Beyond 2y = 40 tanh is one. The constants stand first: NaN stays NaN.
    let doubled = x.div(level.splat(cap)).mul(level.splat(2.0));
    let doubled = level.splat(40.0).min(level.splat(-40.0).max(doubled));
    let grown = crate::vector::exp_minus_one(level, doubled);
    grown.div(grown.add(level.splat(2.0))).mul(level.splat(cap))
}

/// Minus infinity becomes a large number, whose quotient with `e^∞ = ∞` is the limit zero. NaN stays NaN.
#[inline(always)]
fn finite_below<L: Level>(level: L, x: L::Vector) -> L::Vector {
    level.splat(f32::MIN).max(x)
}

#[inline(always)]
fn divide_by_one_plus_exp<L: Level>(level: L, x: L::Vector, exponent: L::Vector) -> L::Vector {
    x.div(level.splat(1.0).add(exp(level, exponent)))
}
