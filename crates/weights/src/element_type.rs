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
}
