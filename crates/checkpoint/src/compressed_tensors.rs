//! The tensors of one quantized Linear in compressed-tensors `pack-quantized`.
//!
//! Format: `compressors/pack_quantized` of <https://github.com/vllm-project/compressed-tensors>. For a Linear `NAME`
//! with N outputs, K inputs and G groups per row:
//!
//! | tensor | type, shape | content |
//! |---|---|---|
//! | `NAME.weight_packed` | i32 `[N, ⌈K·bits/32⌉]` | codes of a row, densely, lowest bits first |
//! | `NAME.weight_scale` | float `[N, G]` | one per group |
//! | `NAME.weight_zero_point` | i32 `[⌈N·bits/32⌉, G]` | zero points packed along the rows; asymmetric grids only |
//! | `NAME.weight_shape` | i64 `[2]` | N, K |
//! | `NAME.weight_g_idx` | i32 `[K]` | group of each column, where columns are not in group order |
//!
//! The format thinks in signed integers and stores them plus `2^(bits−1)`, codes and zero points alike; that sum is
//! the unsigned code of [`QuantizedMatrix`], so nothing is converted. A row whose length is no multiple of the group
//! size ends in a shorter group: G is rounded up. The layout holds that, but other readers refuse it.

use half::{bf16, f16};
use kintsugi_runtime::{Error, ErrorCode, Result};
use kintsugi_weights::{ElementType, QuantizedMatrix, QuantizedParts, pack_codes, packed_words, unpack_codes};
use safetensors::Dtype;

use crate::QuantizationConfig;
use crate::safetensors_file::wrong_shape;
use crate::tensor_set::TensorSet;

/// The suffix that marks a Linear of this format.
pub(crate) const PACKED: &str = "weight_packed";
/// The suffix of the tensor that holds N and K.
pub(crate) const SHAPE: &str = "weight_shape";
const SCALE: &str = "weight_scale";
const ZERO_POINT: &str = "weight_zero_point";
const GROUP_INDEX: &str = "weight_g_idx";

/// Gives every tensor of `matrix`, which must not be empty, to `emit` as suffix, type, shape and little-endian bytes, and stops at its first
/// error.
pub(crate) fn encode(
    matrix: &QuantizedMatrix,
    mut emit: impl FnMut(&'static str, Dtype, Vec<usize>, &[u8]) -> Result<()>,
) -> Result<()> {
    let (rows, columns, groups, bits) = (matrix.rows(), matrix.columns(), matrix.groups(), matrix.bits());

    let width = packed_words(columns, bits);
    let mut packed = vec![0u32; rows * width];
    for (codes, words) in matrix.codes().chunks_exact(columns).zip(packed.chunks_exact_mut(width)) {
        pack_codes(codes, bits, words);
    }
    emit(PACKED, Dtype::I32, vec![rows, width], bytemuck::cast_slice(&packed))?;

    let scales = float_bytes(matrix.scales(), matrix.scale_type());
    emit(SCALE, float_dtype(matrix.scale_type()), vec![rows, groups], &scales)?;

    if let Some(zero_points) = matrix.zero_points() {
        let height = packed_words(rows, bits);
        let mut packed = vec![0u32; height * groups];
        let mut words = vec![0u32; height];
        for group in 0..groups {
            let column: Vec<u8> = zero_points.iter().skip(group).step_by(groups).copied().collect();
            pack_codes(&column, bits, &mut words);
            for (row, &word) in words.iter().enumerate() {
                packed[row * groups + group] = word;
            }
        }
        emit(ZERO_POINT, Dtype::I32, vec![height, groups], bytemuck::cast_slice(&packed))?;
    }

    emit(SHAPE, Dtype::I64, vec![2], bytemuck::cast_slice(&[rows as i64, columns as i64]))?;

    match matrix.group_index() {
        Some(index) => emit(GROUP_INDEX, Dtype::I32, vec![columns], bytemuck::cast_slice(index)),
        None => Ok(()),
    }
}

/// Reads the Linear `name`.
///
/// # Errors
/// `ERR_CHECKPOINT_TENSOR_MISSING`, `ERR_CHECKPOINT_SHAPE`, `ERR_CHECKPOINT_DTYPE`, `ERR_CHECKPOINT_NOT_FINITE` or
/// `ERR_CHECKPOINT_CORRUPT` with the name of the tensor.
pub(crate) fn decode(name: &str, config: &QuantizationConfig, tensors: &TensorSet) -> Result<QuantizedMatrix> {
    let bits = config.bits;
    let (rows, columns) = decode_shape(name, tensors)?;
    let groups = config.group_size.groups(columns);

    let width = checked_words(columns, bits).ok_or_else(|| impossible(name, SHAPE))?;
    let packed: Vec<u32> = integers(name, PACKED, Dtype::I32, &[rows, width], tensors)?;
    // The file holds that many codes, so their number is no surprise to the memory.
    let mut codes = vec![0u8; rows * columns];
    for (codes, words) in codes.chunks_exact_mut(columns).zip(packed.chunks_exact(width)) {
        unpack_codes(words, bits, codes);
    }
    drop(packed);

    let (scales, scale_type) = decode_scales(name, &[rows, groups], tensors)?;

    let zero_points = if config.symmetric {
        refuse_unannounced(name, ZERO_POINT, "the grid is asymmetric", tensors)?;
        None
    } else {
        let height = checked_words(rows, bits).ok_or_else(|| impossible(name, SHAPE))?;
        let packed: Vec<u32> = integers(name, ZERO_POINT, Dtype::I32, &[height, groups], tensors)?;
        let mut zero_points = vec![0u8; rows * groups];
        let mut column = vec![0u8; rows];
        for group in 0..groups {
            let words: Vec<u32> = packed.iter().skip(group).step_by(groups).copied().collect();
            unpack_codes(&words, bits, &mut column);
            for (row, &zero) in column.iter().enumerate() {
                zero_points[row * groups + group] = zero;
            }
        }
        Some(zero_points)
    };

    let group_index = if config.group_index {
        decode_group_index(name, columns, groups, tensors)?
    } else {
        refuse_unannounced(name, GROUP_INDEX, "columns have groups of their own", tensors)?;
        None
    };

    QuantizedMatrix::new(QuantizedParts {
        rows,
        columns,
        bits,
        group_size: config.group_size,
        codes,
        scales,
        scale_type,
        zero_points,
        group_index,
    })
    .map_err(|error| {
        Error::new(ErrorCode::CheckpointCorrupt, error.message)
            .subject(name)
            .hint("The tensors of this Linear do not fit together; download the checkpoint again")
    })
}

/// Rows and columns of the Linear `name`, which must be stored in this format.
pub(crate) fn decode_shape(name: &str, tensors: &TensorSet) -> Result<(usize, usize)> {
    let shape: Vec<i64> = integers(name, SHAPE, Dtype::I64, &[2], tensors)?;
    match (usize::try_from(shape[0]), usize::try_from(shape[1])) {
        (Ok(rows), Ok(columns)) if rows > 0 && columns > 0 => Ok((rows, columns)),
        _ => Err(impossible(name, SHAPE)),
    }
}

fn decode_scales(name: &str, shape: &[usize], tensors: &TensorSet) -> Result<(Vec<f32>, ElementType)> {
    let tensor = format!("{name}.{SCALE}");
    let (_, stored) = tensors.require(&tensor)?;
    if stored.shape != shape {
        return Err(wrong_shape(&tensor, &stored.shape, &format!("{shape:?}")));
    }
    let scales = tensors.matrix(&tensor)?;
    Ok((scales.to_f32(), scales.element_type()))
}

/// `None` where the columns are in group order: no tensor, or one that was never filled (all −1).
fn decode_group_index(name: &str, columns: usize, groups: usize, tensors: &TensorSet) -> Result<Option<Vec<u32>>> {
    let tensor = format!("{name}.{GROUP_INDEX}");
    if tensors.get(&tensor).is_none() {
        return Ok(None);
    }
    let index: Vec<i32> = integers(name, GROUP_INDEX, Dtype::I32, &[columns], tensors)?;
    if index.iter().all(|&group| group == -1) {
        return Ok(None);
    }
    let group_of = |(column, &group): (usize, &i32)| {
        u32::try_from(group).ok().filter(|&group| (group as usize) < groups).ok_or_else(|| {
            Error::new(
                ErrorCode::CheckpointCorrupt,
                format!("column {column} belongs to group {group}, but there are {groups} groups"),
            )
            .subject(&tensor)
            .hint("The tensor is damaged; download the checkpoint again")
        })
    };
    index.iter().enumerate().map(group_of).collect::<Result<_>>().map(Some)
}

/// The values of a tensor of integers that must have type `dtype`, as wide as `T`, and `shape`.
fn integers<T: bytemuck::Pod>(
    name: &str,
    suffix: &str,
    dtype: Dtype,
    shape: &[usize],
    tensors: &TensorSet,
) -> Result<Vec<T>> {
    let tensor = format!("{name}.{suffix}");
    let (file, stored) = tensors.require(&tensor)?;
    if stored.dtype != dtype {
        return Err(Error::new(
            ErrorCode::CheckpointDtype,
            format!("the tensor has type {}, expected {dtype}", stored.dtype),
        )
        .subject(tensor)
        .hint("Quantize the model again with a present release of compressed-tensors"));
    }
    if stored.shape != shape {
        return Err(wrong_shape(&tensor, &stored.shape, &format!("{shape:?}")));
    }
    file.read_values(stored)
}

/// A tensor that `config.json` does not speak of would be ignored by other readers, silently.
fn refuse_unannounced(name: &str, suffix: &str, meaning: &str, tensors: &TensorSet) -> Result<()> {
    let tensor = format!("{name}.{suffix}");
    match tensors.get(&tensor) {
        None => Ok(()),
        Some(_) => Err(Error::new(
            ErrorCode::CheckpointCorrupt,
            format!("the tensor says that {meaning}, the quantization config says the opposite"),
        )
        .subject(tensor)
        .hint("config.json and weights may belong to different models; download the folder again")),
    }
}

fn checked_words(count: usize, bits: u8) -> Option<usize> {
    count.checked_mul(usize::from(bits)).map(|total| total.div_ceil(32))
}

fn impossible(name: &str, suffix: &str) -> Error {
    Error::new(ErrorCode::CheckpointShape, "the tensor holds an impossible size")
        .subject(format_args!("{name}.{suffix}"))
        .hint("The checkpoint is damaged; download it again")
}

/// The name of `element_type` in safetensors.
pub(crate) fn float_dtype(element_type: ElementType) -> Dtype {
    match element_type {
        ElementType::F32 => Dtype::F32,
        ElementType::F16 => Dtype::F16,
        ElementType::Bf16 => Dtype::BF16,
    }
}

/// `values` in `element_type` as little-endian bytes.
pub(crate) fn float_bytes(values: &[f32], element_type: ElementType) -> Vec<u8> {
    match element_type {
        ElementType::F32 => bytemuck::cast_slice(values).to_vec(),
        ElementType::F16 => values.iter().flat_map(|&value| f16::from_f32(value).to_le_bytes()).collect(),
        ElementType::Bf16 => values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect(),
    }
}
