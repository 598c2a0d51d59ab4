use kintsugi_runtime::{Error, ErrorCode, Result};
use kintsugi_weights::{CodeTable, ElementType};

use super::{code_tables, k_quants, legacy_blocks, ternary};

/// A type of tensors in GGUF files: rows are cut into blocks of elements, each block lies in the file on its own.
#[derive(Debug)]
pub struct GgufType {
    /// As ggml names it.
    pub name: &'static str,
    /// Number in the file.
    pub id: u32,
    /// Elements of a block.
    pub block_elements: usize,
    /// Bytes of a block.
    pub block_bytes: usize,
    /// What the blocks hold.
    pub content: BlockContent,
}

/// What the blocks of a type hold.
#[derive(Clone, Copy, Debug)]
pub enum BlockContent {
    /// Plain floats, one per block.
    Float(ElementType),
    /// Codes with scales.
    Codes(BlockCodes),
    /// Something that is not read: integers, or codes of a lattice.
    Other,
}

/// Takes a block apart.
pub type UnpackBlock = fn(&[u8], &mut BlockParts<'_>);
/// Rounds the values of a block.
pub type RoundBlock = fn(&[f32], &mut [u8]);
/// Puts a block together; false when it cannot hold the parts exactly.
pub type PackBlock = fn(&BlockParts<'_>, &mut [u8]) -> bool;

/// How the blocks of a type become codes, scales and offsets.
#[derive(Clone, Copy, Debug)]
pub struct BlockCodes {
    /// Width of a code.
    pub bits: u8,
    /// Elements that share a scale.
    pub group: usize,
    /// What a code means.
    pub grid: BlockGrid,
    /// Takes a block apart.
    pub unpack: UnpackBlock,
    /// Rounds the values of a block. `None` for types that are not written.
    pub round: Option<RoundBlock>,
    /// Puts a block together again. `None` for types that are not written.
    pub pack: Option<PackBlock>,
}

/// What the code of an element means, beside its scale.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum BlockGrid {
    /// `(code − 2^(bits−1)) · scale`.
    Centered,
    /// `(code − zero) · scale`.
    Zero(u8),
    /// `code · scale + offset`.
    Offset,
    /// `table[code] · scale`.
    Table(CodeTable),
}

/// A block taken apart: one code per element, one scale and, on grids with offsets, one offset per group.
#[derive(Debug)]
pub struct BlockParts<'a> {
    /// One per element.
    pub codes: &'a mut [u8],
    /// One per group.
    pub scales: &'a mut [f32],
    /// One per group; empty on other grids.
    pub offsets: &'a mut [f32],
}

impl PartialEq for GgufType {
    fn eq(&self, other: &Self) -> bool {
        self.id == other.id
    }
}

impl Eq for GgufType {}

const fn float(name: &'static str, id: u32, bytes: usize, kind: ElementType) -> GgufType {
    GgufType { name, id, block_elements: 1, block_bytes: bytes, content: BlockContent::Float(kind) }
}

const fn codes(name: &'static str, id: u32, elements: usize, bytes: usize, codes: BlockCodes) -> GgufType {
    GgufType { name, id, block_elements: elements, block_bytes: bytes, content: BlockContent::Codes(codes) }
}

const fn other(name: &'static str, id: u32, elements: usize, bytes: usize) -> GgufType {
    GgufType { name, id, block_elements: elements, block_bytes: bytes, content: BlockContent::Other }
}

/// Every type of tensors whose size is known: name, number, elements and bytes of a block.
pub const GGUF_TYPES: &[GgufType] = &[
    float("F32", 0, 4, ElementType::F32),
    float("F16", 1, 2, ElementType::F16),
    float("BF16", 30, 2, ElementType::Bf16),
    codes("Q4_0", 2, 32, 18, legacy_blocks::Q4_0),
    codes("Q4_1", 3, 32, 20, legacy_blocks::Q4_1),
    codes("Q5_0", 6, 32, 22, legacy_blocks::Q5_0),
    codes("Q5_1", 7, 32, 24, legacy_blocks::Q5_1),
    codes("Q8_0", 8, 32, 34, legacy_blocks::Q8_0),
    codes("Q2_K", 10, 256, 84, k_quants::Q2_K),
    codes("Q3_K", 11, 256, 110, k_quants::Q3_K),
    codes("Q4_K", 12, 256, 144, k_quants::Q4_K),
    codes("Q5_K", 13, 256, 176, k_quants::Q5_K),
    codes("Q6_K", 14, 256, 210, k_quants::Q6_K),
    codes("IQ4_NL", 20, 32, 18, code_tables::IQ4_NL),
    codes("IQ4_XS", 23, 256, 136, code_tables::IQ4_XS),
    codes("MXFP4", 39, 32, 17, code_tables::MXFP4),
    codes("NVFP4", 40, 64, 36, code_tables::NVFP4),
    codes("TQ1_0", 34, 256, 54, ternary::TQ1_0),
    codes("TQ2_0", 35, 256, 66, ternary::TQ2_0),
    other("Q8_1", 9, 32, 40),
    other("Q8_K", 15, 256, 292),
    other("IQ2_XXS", 16, 256, 66),
    other("IQ2_XS", 17, 256, 74),
    other("IQ3_XXS", 18, 256, 98),
    other("IQ1_S", 19, 256, 50),
    other("IQ3_S", 21, 256, 110),
    other("IQ2_S", 22, 256, 82),
    other("I8", 24, 1, 1),
    other("I16", 25, 1, 2),
    other("I32", 26, 1, 4),
    other("I64", 27, 1, 8),
    other("F64", 28, 1, 8),
    other("IQ1_M", 29, 256, 56),
    other("Q1_0", 41, 128, 18),
];

impl GgufType {
    /// The type of that number.
    pub fn by_id(id: u32) -> Option<&'static GgufType> {
        GGUF_TYPES.iter().find(|known| known.id == id)
    }

    /// The type of that name that can be written.
    ///
    /// # Errors
    /// `ERR_OPTION_UNKNOWN`, with the nearest name and all names in the hint.
    pub fn written(name: &str) -> Result<&'static GgufType> {
        let written = || GGUF_TYPES.iter().filter(|known| known.is_written());
        written().find(|known| known.name.eq_ignore_ascii_case(name)).ok_or_else(|| {
            let names: Vec<&str> = written().map(|known| known.name).collect();
            let closest = kintsugi_runtime::nearest(name, names.iter().copied()).unwrap_or_default();
            Error::new(ErrorCode::OptionUnknown, format!("{name:?} is not a type that GGUF files are written with"))
                .subject("type")
                .hint(format!("Did you mean {closest:?}? Types are: {}", names.join(", ")))
        })
    }

    /// Bits of a code and columns of a group, where each block is a group of symmetric integer codes with one scale in
    /// half precision: such a type holds what a compression rounds to that grid as it is.
    pub fn symmetric_grid(&self) -> Option<(u8, usize)> {
        match self.content {
            BlockContent::Codes(codes) if codes.grid == BlockGrid::Centered && codes.group == self.block_elements => {
                Some((codes.bits, codes.group))
            }
            _ => None,
        }
    }

    /// Whether tensors of this type are read.
    pub fn is_read(&self) -> bool {
        !matches!(self.content, BlockContent::Other)
    }

    /// Whether dense tensors can be written in this type.
    pub fn is_written(&self) -> bool {
        match self.content {
            BlockContent::Float(_) => true,
            BlockContent::Codes(codes) => codes.round.is_some(),
            BlockContent::Other => false,
        }
    }

    /// Bytes of a tensor of `shape`, `None` when rows are no whole blocks or the size overflows.
    pub fn bytes_of(&self, shape: &[usize]) -> Option<u64> {
        let row = *shape.last()?;
        if !row.is_multiple_of(self.block_elements) {
            return None;
        }
        let elements = shape.iter().try_fold(1u64, |product, &size| product.checked_mul(size as u64))?;
        (elements / self.block_elements as u64).checked_mul(self.block_bytes as u64)
    }

    /// Names what is read, for errors.
    pub(crate) fn hint() -> String {
        let names: Vec<&str> = GGUF_TYPES.iter().filter(|known| known.is_read()).map(|known| known.name).collect();
        format!("Types that are read: {}; take a file of one of these", names.join(", "))
    }
}

impl BlockCodes {
    /// Groups of a block.
    pub(crate) fn groups(&self, elements: usize) -> usize {
        elements / self.group
    }

    /// Whether groups have offsets.
    pub(crate) fn has_offsets(&self) -> bool {
        self.grid == BlockGrid::Offset
    }
}

/// A half-precision number of a block.
pub(crate) fn half_at(block: &[u8], at: usize) -> f32 {
    half::f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Writes a number that is a half-precision one exactly; false when it is not.
pub(crate) fn put_exact_half(value: f32, block: &mut [u8], at: usize) -> bool {
    let half = half::f16::from_f32(value);
    block[at..at + 2].copy_from_slice(&half.to_le_bytes());
    half.to_f32() == value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_consistent() {
        for (place, known) in GGUF_TYPES.iter().enumerate() {
            assert!(GGUF_TYPES[..place].iter().all(|before| before.id != known.id && before.name != known.name));
            if let BlockContent::Codes(codes) = known.content {
                assert_eq!(known.block_elements % codes.group, 0, "{}", known.name);
                assert_eq!(codes.round.is_some(), codes.pack.is_some(), "{}", known.name);
            }
        }
        assert_eq!(GgufType::written("q8_0").unwrap().name, "Q8_0");
        assert_eq!(GgufType::written("Q5_0").unwrap_err().code, ErrorCode::OptionUnknown);
    }

    #[test]
    fn sizes_are_checked() {
        let q4 = GgufType::by_id(2).unwrap();
        assert_eq!(q4.bytes_of(&[3, 64]), Some(3 * 36));
        assert_eq!(q4.bytes_of(&[3, 40]), None);
        assert_eq!(q4.bytes_of(&[usize::MAX, 64]), None);
        assert_eq!(q4.bytes_of(&[]), None);
    }
}
