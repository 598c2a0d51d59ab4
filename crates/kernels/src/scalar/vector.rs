use crate::strip::HALF;
use crate::vector::{Half, LANES, Level, Vector};

/// 32 lanes in memory or in whatever registers the baseline of the target has.
#[derive(Clone, Copy)]
pub(crate) struct F32x32([f32; LANES]);

/// 16 lanes likewise.
#[derive(Clone, Copy)]
pub(crate) struct F32x16([f32; HALF]);

/// Plain Rust: every CPU has it.
#[derive(Clone, Copy)]
pub(crate) struct Scalar;

macro_rules! lanewise {
    (|$i:ident| $value:expr) => {{
        let mut lanes = [0.0f32; LANES];
        for $i in 0..LANES {
            lanes[$i] = $value;
        }
        F32x32(lanes)
    }};
}

impl Vector for F32x32 {
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        lanewise!(|i| self.0[i] + other.0[i])
    }

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        lanewise!(|i| self.0[i] - other.0[i])
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        lanewise!(|i| self.0[i] * other.0[i])
    }

    #[inline(always)]
    fn div(self, other: Self) -> Self {
        lanewise!(|i| self.0[i] / other.0[i])
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        // Not f32::mul_add: without hardware for it that is a library call per lane.
        lanewise!(|i| self.0[i] * factor.0[i] + addend.0[i])
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        lanewise!(|i| if self.0[i] > other.0[i] { self.0[i] } else { other.0[i] })
    }

    #[inline(always)]
    fn min(self, other: Self) -> Self {
        lanewise!(|i| if self.0[i] < other.0[i] { self.0[i] } else { other.0[i] })
    }

    #[inline(always)]
    fn power_of_two(self) -> Self {
        lanewise!(|i| f32::from_bits((self.0[i].to_bits() << 23).wrapping_add(0x3f80_0000)))
    }

    #[inline(always)]
    fn store(self, out: &mut [f32; LANES]) {
        *out = self.0;
    }
}

impl Half for F32x16 {
    #[inline(always)]
    fn add(mut self, other: Self) -> Self {
        for i in 0..HALF {
            self.0[i] += other.0[i];
        }
        self
    }

    #[inline(always)]
    fn mul_add(mut self, factor: Self, addend: Self) -> Self {
        for i in 0..HALF {
            self.0[i] = self.0[i] * factor.0[i] + addend.0[i];
        }
        self
    }

    #[inline(always)]
    fn store(self, out: &mut [f32]) {
        out[..HALF].copy_from_slice(&self.0);
    }
}

impl Level for Scalar {
    type Vector = F32x32;
    type Half = F32x16;
    type Words = [u32; LANES];
    type Table = [f32; 16];

    unsafe fn assume() -> Self {
        Scalar
    }

    #[inline(always)]
    fn splat(self, value: f32) -> F32x32 {
        F32x32([value; LANES])
    }

    #[inline(always)]
    fn splat_half(self, value: f32) -> F32x16 {
        F32x16([value; HALF])
    }

    #[inline(always)]
    fn half(self, values: &[f32]) -> F32x16 {
        let mut lanes = [0.0; HALF];
        lanes.copy_from_slice(&values[..HALF]);
        F32x16(lanes)
    }

    #[inline(always)]
    fn load(self, values: &[f32; LANES]) -> F32x32 {
        F32x32(*values)
    }

    #[inline(always)]
    fn load_words(self, bytes: &[u8; 4 * LANES]) -> [u32; LANES] {
        let mut words = [0; LANES];
        for (word, bytes) in words.iter_mut().zip(bytes.as_chunks::<4>().0) {
            *word = u32::from_le_bytes(*bytes);
        }
        words
    }

    #[inline(always)]
    fn load_f16(self, bytes: &[u8; 2 * LANES]) -> F32x32 {
        lanewise!(|i| f16_to_f32(u16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]])))
    }

    #[inline(always)]
    fn load_bf16(self, bytes: &[u8; 2 * LANES]) -> F32x32 {
        lanewise!(|i| f32::from_bits(u32::from(u16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]])) << 16))
    }

    #[inline(always)]
    fn load_i8(self, bytes: &[u8; LANES]) -> F32x32 {
        lanewise!(|i| f32::from(bytes[i] as i8))
    }

    #[inline(always)]
    fn f32s(self, words: [u32; LANES]) -> F32x32 {
        lanewise!(|i| f32::from_bits(words[i]))
    }

    #[inline(always)]
    fn bf16_pair(self, words: [u32; LANES]) -> (F32x32, F32x32) {
        (lanewise!(|i| f32::from_bits(words[i] << 16)), lanewise!(|i| f32::from_bits(words[i] & 0xffff_0000)))
    }

    #[inline(always)]
    fn masked(self, words: [u32; LANES], shift: u32, mask: u32) -> [u32; LANES] {
        let mask = mask * 0x0001_0001;
        words.map(|word| word >> shift & mask)
    }

    #[inline(always)]
    fn or(self, a: [u32; LANES], b: [u32; LANES]) -> [u32; LANES] {
        std::array::from_fn(|i| a[i] | b[i])
    }

    #[inline(always)]
    fn field_pair<const BITS: u32>(self, words: [u32; LANES], position: u32) -> (F32x32, F32x32) {
        (signed_field::<BITS>(words, position), signed_field::<BITS>(words, 16 + position))
    }

    #[inline(always)]
    fn table(self, values: &[f32; 16]) -> [f32; 16] {
        *values
    }

    #[inline(always)]
    fn table4_pair<const PAIR: u32>(self, table: [f32; 16], words: [u32; LANES]) -> (F32x32, F32x32) {
        let field = |word: u32, position: u32| table[(word >> position & 15) as usize];
        (lanewise!(|i| field(words[i], 4 * PAIR)), lanewise!(|i| field(words[i], 16 + 4 * PAIR)))
    }
}

/// The signed number of `BITS` bits at `position`.
#[inline(always)]
fn signed_field<const BITS: u32>(words: [u32; LANES], position: u32) -> F32x32 {
    let up = 32u32.wrapping_sub(BITS).wrapping_sub(position);
    lanewise!(|i| (words[i].wrapping_shl(up) as i32 >> (32 - BITS)) as f32)
}

/// Exponent and mantissa moved into place and scaled by the difference of the exponent biases; only infinities and
/// NaN need their exponent set.
#[inline(always)]
fn f16_to_f32(bits: u16) -> f32 {
    let bits = u32::from(bits);
    let magnitude = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits((127 + 112) << 23);
    let special = if bits & 0x7c00 == 0x7c00 { 0x7f80_0000 } else { 0 };
    f32::from_bits(magnitude.to_bits() | special | (bits & 0x8000) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_becomes_the_float_that_it_stands_for() {
        for bits in 0..=u16::MAX {
            let expected = half::f16::from_bits(bits).to_f32();
            let value = f16_to_f32(bits);
            assert!(
                value == expected && value.is_sign_negative() == expected.is_sign_negative()
                    || expected.is_nan() && value.is_nan(),
                "{bits:#06x}: {value} {expected}"
            );
        }
    }
}
