use crate::prefetch::{Cache, Prefetch};

/// Lanes of a [`Vector`] and rows of a panel of a packed matrix.
pub(crate) const LANES: usize = 32;

/// 32 f32 values in the registers of one CPU level.
///
/// A value can only come from a [`Level`], whose construction promises the instructions; so arithmetic on values is
/// safe.
pub(crate) trait Vector: Copy {
    fn add(self, other: Self) -> Self;
    fn sub(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    fn div(self, other: Self) -> Self;
    /// `self · factor + addend`, with one rounding where the level has fused products and two where not.
    fn mul_add(self, factor: Self, addend: Self) -> Self;
    /// The larger of each lane; `other` where either is NaN.
    fn max(self, other: Self) -> Self;
    /// The smaller of each lane; `other` where either is NaN.
    fn min(self, other: Self) -> Self;
    /// `2^n` where every lane holds `n + 1.5·2^23` with an integer n in −126…127.
    fn power_of_two(self) -> Self;
    fn store(self, out: &mut [f32; LANES]);

    /// The lanes in memory.
    #[inline(always)]
    fn to_array(self) -> [f32; LANES] {
        let mut lanes = [0.0; LANES];
        self.store(&mut lanes);
        lanes
    }

    /// Sum of the lanes, in an order that is the same at every level.
    #[inline(always)]
    fn sum(self) -> f32 {
        fold(self.to_array(), |a, b| a + b)
    }

    /// Largest lane. What comes out when a lane is NaN is not specified.
    #[inline(always)]
    fn maximum(self) -> f32 {
        fold(self.to_array(), |a, b| if a > b { a } else { b })
    }
}

/// 16 f32 values: what tiles of many rows are made of, so that their sums fit into registers.
pub(crate) trait Half: Copy {
    fn add(self, other: Self) -> Self;
    /// As [`Vector::mul_add`].
    fn mul_add(self, factor: Self, addend: Self) -> Self;
    /// Writes 16 values.
    fn store(self, out: &mut [f32]);
}

/// The instructions of one CPU level. A value is the proof that this CPU has them.
pub(crate) trait Level: Copy {
    type Vector: Vector;
    type Half: Half;
    /// 32 words of 32 bit as they lie in a panel.
    type Words: Copy;
    /// What the codes of 4 bits stand for, in registers.
    type Table: Copy;
    /// How codes are asked for ahead of their products, as measured.
    const PREFETCH: Prefetch = Prefetch { distance: 2048, cache: Cache::First };

    /// # Safety
    /// The CPU must have the instructions of the level.
    unsafe fn assume() -> Self;

    fn splat(self, value: f32) -> Self::Vector;
    fn load(self, values: &[f32; LANES]) -> Self::Vector;
    fn splat_half(self, value: f32) -> Self::Half;
    /// Takes 16 values.
    fn half(self, values: &[f32]) -> Self::Half;
    /// Little-endian words without alignment.
    fn load_words(self, bytes: &[u8; 4 * LANES]) -> Self::Words;
    /// binary16 to f32.
    fn load_f16(self, bytes: &[u8; 2 * LANES]) -> Self::Vector;
    /// bfloat16 to f32.
    fn load_bf16(self, bytes: &[u8; 2 * LANES]) -> Self::Vector;
    /// Signed bytes to f32.
    fn load_i8(self, bytes: &[u8; LANES]) -> Self::Vector;
    /// The words as binary32.
    fn f32s(self, words: Self::Words) -> Self::Vector;
    /// The lower and the upper half of each word as bfloat16.
    fn bf16_pair(self, words: Self::Words) -> (Self::Vector, Self::Vector);
    /// Both halves of each word shifted to the right by `shift`, and of them the bits of `mask` alone. Those that come
    /// from the other half must not be among them.
    fn masked(self, words: Self::Words, shift: u32, mask: u32) -> Self::Words;
    fn or(self, a: Self::Words, b: Self::Words) -> Self::Words;
    /// The signed numbers of `BITS` bits at `position` of the lower and the upper half of each word.
    fn field_pair<const BITS: u32>(self, words: Self::Words, position: u32) -> (Self::Vector, Self::Vector);
    fn table(self, values: &[f32; 16]) -> Self::Table;
    /// Columns `2·PAIR` and `2·PAIR + 1` of words of eight 4-bit codes, looked up.
    fn table4_pair<const PAIR: u32>(self, table: Self::Table, words: Self::Words) -> (Self::Vector, Self::Vector);
}

/// Folds halves onto each other: 32, 16, 8, 4, 2, 1.
#[inline(always)]
fn fold(mut lanes: [f32; LANES], combine: impl Fn(f32, f32) -> f32) -> f32 {
    let mut width = LANES;
    while width > 1 {
        width /= 2;
        for i in 0..width {
            lanes[i] = combine(lanes[i], lanes[i + width]);
        }
    }
    lanes[0]
}

/// Adding it rounds to an integer, which then stands in the lowest bits.
const ROUND: f32 = 12_582_912.0;

/// `x = n·ln 2 + r` with |r| ≤ ln 2 / 2: `n + ROUND` and r.
#[inline(always)]
fn reduce<L: Level>(level: L, x: L::Vector) -> (L::Vector, L::Vector) {
    /// ln 2 = 355/512 − 2.12194440e-4; n times the first part is exact.
    const LN_2_HIGH: f32 = 355.0 / 512.0;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let rounded = x.mul_add(level.splat(std::f32::consts::LOG2_E), level.splat(ROUND));
    let n = rounded.sub(level.splat(ROUND));
    let r = n.mul_add(level.splat(-LN_2_HIGH), x);
    (rounded, n.mul_add(level.splat(-LN_2_LOW), r))
}

/// A polynomial, the coefficient of the highest power first.
#[inline(always)]
fn polynomial<L: Level, const COUNT: usize>(level: L, coefficients: [f32; COUNT], x: L::Vector) -> L::Vector {
    let mut value = level.splat(coefficients[0]);
    for coefficient in &coefficients[1..] {
        value = value.mul_add(x, level.splat(*coefficient));
    }
    value
}

/// `e^x` of each lane within 2 units in the last place: 0 below −104, infinite above 88.73, NaN where x is NaN.
///
/// `x = n·ln 2 + r` with |r| ≤ ln 2 / 2, the Taylor polynomial of degree 7 for `e^r` (remainder 5e-9), and `2^n` in
/// two factors, so that subnormal and infinite results come out right.
#[inline(always)]
pub(crate) fn exp<L: Level>(level: L, x: L::Vector) -> L::Vector {
    const TAYLOR: [f32; 8] = [1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];

    // The constant stands first: NaN in x stays NaN.
    let x = level.splat(89.0).min(level.splat(-104.0).max(x));
    let (rounded, r) = reduce(level, x);
    let value = polynomial(level, TAYLOR, r);
    let round = level.splat(ROUND);
    let n = rounded.sub(round);
    let half = n.mul_add(level.splat(0.5), round);
    let rest = n.sub(half.sub(round)).add(round);
    value.mul(half.power_of_two()).mul(rest.power_of_two())
}

/// `e^x − 1` of each lane with |x| ≤ 80, exact to a few units in the last place near zero too; NaN where x is NaN.
///
/// `2^n · (e^r − 1) + (2^n − 1)`, where the Taylor polynomial of `e^r − 1` has no constant term to cancel.
#[inline(always)]
pub(crate) fn exp_minus_one<L: Level>(level: L, x: L::Vector) -> L::Vector {
    const TAYLOR: [f32; 7] = [1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0];

    let (rounded, r) = reduce(level, x);
    let power = rounded.power_of_two();
    polynomial(level, TAYLOR, r).mul(r).mul_add(power, power.sub(level.splat(1.0)))
}
