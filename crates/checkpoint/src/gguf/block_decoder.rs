//! Blocks of a tensor into the canonical matrix.

use half::{bf16, f16};
use kintsugi_runtime::{Error, ErrorCode, Result};
use kintsugi_weights::{
    CodeTable, DenseMatrix, DenseValues, ElementType, GroupSize, QuantizedMatrix, QuantizedParts, WeightMatrix,
};

use super::GgufType;
use super::block_format::{BlockCodes, BlockContent, BlockGrid, BlockParts};
use crate::safetensors_file::not_finite;

/// The matrix whose rows lie behind each other in `bytes`.
///
/// # Errors
/// `ERR_QUANTIZATION_UNSUPPORTED`, `ERR_CHECKPOINT_NOT_FINITE`.
pub(crate) fn decode(
    name: &str,
    gguf_type: &'static GgufType,
    rows: usize,
    columns: usize,
    bytes: &[u8],
) -> Result<WeightMatrix> {
    match gguf_type.content {
        BlockContent::Float(kind) => {
            let values = match kind {
                ElementType::F32 => DenseValues::F32(bytemuck::allocation::pod_collect_to_vec::<u8, f32>(bytes)),
                ElementType::F16 => DenseValues::F16(bytemuck::allocation::pod_collect_to_vec::<u8, f16>(bytes)),
                ElementType::Bf16 => DenseValues::Bf16(bytemuck::allocation::pod_collect_to_vec::<u8, bf16>(bytes)),
            };
            let matrix = DenseMatrix::new(rows, columns, values);
            match matrix.first_not_finite() {
                Some((row, column)) => Err(not_finite(name, &format!("row {row}, column {column}"))),
                None => Ok(WeightMatrix::Dense(matrix)),
            }
        }
        BlockContent::Codes(codes) => {
            let parts = decode_codes(gguf_type, &codes, rows, columns, bytes);
            if let Some((row, column)) = first_not_finite(&parts) {
                return Err(not_finite(name, &format!("row {row}, column {column}")));
            }
            QuantizedMatrix::new(parts).map(WeightMatrix::Quantized).map_err(|error| error.subject(name))
        }
        BlockContent::Other => {
            let message = format!("the tensor has type {}, which is not read", gguf_type.name);
            Err(Error::new(ErrorCode::QuantizationUnsupported, message).subject(name).hint(GgufType::hint()))
        }
    }
}

fn decode_codes(gguf_type: &GgufType, codes: &BlockCodes, rows: usize, columns: usize, bytes: &[u8]) -> QuantizedParts {
    let groups = codes.groups(gguf_type.block_elements);
    let count = rows * columns / codes.group;
    let mut parts = QuantizedParts {
        rows,
        columns,
        bits: codes.bits,
        group_size: GroupSize::Columns(codes.group),
        codes: vec![0; rows * columns],
        scales: vec![0.0; count],
        // Products of two numbers of a block need more bits than half precision has.
        scale_type: if groups == 1 { ElementType::F16 } else { ElementType::F32 },
        offsets: codes.has_offsets().then(|| vec![0.0; count]),
        zero_points: match codes.grid {
            BlockGrid::Zero(zero) => Some(vec![zero; count]),
            _ => None,
        },
        code_table: match codes.grid {
            BlockGrid::Table(table) => Some(table),
            _ => None,
        },
        ..QuantizedParts::default()
    };
    if codes.grid == BlockGrid::Table(CodeTable::FP4) {
        parts.scale_type = ElementType::F32;
    }
    let mut no_offsets = [];
    for (place, block) in bytes.chunks_exact(gguf_type.block_bytes).enumerate() {
        let elements = place * gguf_type.block_elements..(place + 1) * gguf_type.block_elements;
        let of_block = place * groups..(place + 1) * groups;
        let offsets = match &mut parts.offsets {
            Some(offsets) => &mut offsets[of_block.clone()],
            None => &mut no_offsets[..],
        };
        let mut block_parts =
            BlockParts { codes: &mut parts.codes[elements], scales: &mut parts.scales[of_block], offsets };
        (codes.unpack)(block, &mut block_parts);
    }
    parts
}

/// Row and column of the first value that is not finite. Only a scale that is none, or close to the largest number,
/// leads to one.
fn first_not_finite(parts: &QuantizedParts) -> Option<(usize, usize)> {
    let group = parts.columns / parts.groups();
    let offset = |place: usize| parts.offsets.as_ref().map_or(0.0, |offsets| offsets[place]);
    let place = (0..parts.scales.len()).find(|&place| {
        let bound = parts.scales[place] * 256.0 + offset(place);
        let value = |code: u8| match &parts.code_table {
            Some(table) => table.values()[usize::from(code)] * parts.scales[place],
            None => f32::from(code) * parts.scales[place] + offset(place),
        };
        let codes = &parts.codes[place * group..(place + 1) * group];
        !bound.is_finite() && codes.iter().any(|&code| !value(code).is_finite())
    })?;
    Some((place / parts.groups(), place % parts.groups() * group))
}
