use half::{bf16, f16};
use serde::{Deserialize, Serialize};

/// The float types that weights, scales and factors are stored in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ElementType {
    /// IEEE binary32.
    #[default]
    F32,
    /// IEEE binary16.
    F16,
    /// The upper half of a binary32.
    Bf16,
}

impl ElementType {
    /// Every type.
    pub const ALL: [ElementType; 3] = [ElementType::F32, ElementType::F16, ElementType::Bf16];

    /// Bits of one element.
    pub const fn bits(self) -> usize {
        match self {
            ElementType::F32 => 32,
            ElementType::F16 | ElementType::Bf16 => 16,
        }
    }

    /// Lower-case name: `f32`, `f16`, `bf16`.
    pub const fn name(self) -> &'static str {
        match self {
            ElementType::F32 => "f32",
            ElementType::F16 => "f16",
            ElementType::Bf16 => "bf16",
        }
    }

    /// The type of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|element| element.name() == name)
    }

    /// `value` after one trip through this type (round to nearest, ties to even).
    pub fn round(self, value: f32) -> f32 {
        match self {
            ElementType::F32 => value,
            ElementType::F16 => f16::from_f32(value).to_f32(),
            ElementType::Bf16 => bf16::from_f32(value).to_f32(),
        }
    }

    /// The values of `bytes`, little-endian, as f32.
    pub fn widen(self, bytes: &[u8]) -> Vec<f32> {
        let halves = || bytes.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]]));
        match self {
            ElementType::F32 => {
                bytes.chunks_exact(4).map(|word| f32::from_le_bytes([word[0], word[1], word[2], word[3]])).collect()
            }
            ElementType::F16 => halves().map(|bits| f16::from_bits(bits).to_f32()).collect(),
            ElementType::Bf16 => halves().map(|bits| bf16::from_bits(bits).to_f32()).collect(),
        }
    }

    /// Position of the first value of `bytes`, little-endian, that is NaN or infinite.
    pub fn first_not_finite(self, bytes: &[u8]) -> Option<usize> {
        match self {
            ElementType::F32 => position_in_chunks(bytes, |word: [u8; 4]| u32::from_le_bytes(word) << 1 >= 0xff << 24),
            ElementType::F16 => position_in_chunks(bytes, |pair: [u8; 2]| u16::from_le_bytes(pair) << 1 >= 0x1f << 11),
            ElementType::Bf16 => position_in_chunks(bytes, |pair: [u8; 2]| u16::from_le_bytes(pair) << 1 >= 0xff << 8),
        }
    }
}

/// Position of the first value for which `found` holds. Whole chunks are looked at before single values, because a loop
/// without an exit works on many values at a time.
fn position_in_chunks<const N: usize>(bytes: &[u8], found: impl Fn([u8; N]) -> bool) -> Option<usize> {
    const CHUNK: usize = 4096;
    let values = bytes.as_chunks::<N>().0;
    let start =
        values.chunks(CHUNK).position(|chunk| chunk.iter().fold(false, |any, &value| any | found(value)))? * CHUNK;
    values[start..].iter().position(|&value| found(value)).map(|position| start + position)
}
