//! Codes as rows of 32-bit words beside their size, as compressed-tensors `pack-quantized` and our own layout store them.

use kintsugi_runtime::{Error, Result};
use kintsugi_weights::{QuantizedMatrix, packed_words};
use safetensors::Dtype;

use super::compressed_tensors::GROUP_INDEX;
use crate::LinearTensors;
use crate::linear_format::EncodedTensor;
use crate::packed_rows::{pack_rows, unpack_rows};

/// i32 `[N, ⌈K·bits/32⌉]`: codes of a row, densely, lowest bits first.
pub(super) const PACKED: &str = "weight_packed";
/// i64 `[2]`: N, K.
const SHAPE: &str = "weight_shape";

/// Rows and columns, neither of them zero.
///
/// # Errors
/// Those of [`LinearTensors::integers`]; `ERR_CHECKPOINT_SHAPE`.
pub(super) fn shape(linear: &LinearTensors<'_>) -> Result<(usize, usize)> {
    let shape: Vec<i64> = linear.integers(SHAPE, Dtype::I64, &[2])?;
    match (usize::try_from(shape[0]), usize::try_from(shape[1])) {
        (Ok(rows), Ok(columns)) if rows > 0 && columns > 0 => Ok((rows, columns)),
        _ => Err(impossible(linear)),
    }
}

/// Words that hold so many codes.
///
/// # Errors
/// `ERR_CHECKPOINT_SHAPE` for more than there can be.
pub(super) fn words(linear: &LinearTensors<'_>, count: usize, bits: u8) -> Result<usize> {
    let total = count.checked_mul(usize::from(bits)).ok_or_else(|| impossible(linear))?;
    Ok(total.div_ceil(32))
}

/// The codes of a matrix of that size. The file holds so many, so their number is no surprise to the memory.
///
/// # Errors
/// As [`words`]; those of [`LinearTensors::integers`].
pub(super) fn read(linear: &LinearTensors<'_>, rows: usize, columns: usize, bits: u8) -> Result<Vec<u8>> {
    let width = words(linear, columns, bits)?;
    let packed: Vec<u32> = linear.integers(PACKED, Dtype::I32, &[rows, width])?;
    Ok(unpack_rows(&packed, columns, bits))
}

/// Gives codes, size and group index to `emit`.
///
/// # Errors
/// Those of `emit`.
pub(super) fn write(matrix: &QuantizedMatrix, emit: &mut dyn FnMut(EncodedTensor<'_>) -> Result<()>) -> Result<()> {
    let (rows, columns, bits) = (matrix.rows(), matrix.columns(), matrix.bits());
    let packed = pack_rows(matrix.codes(), columns, bits);
    let shape = vec![rows, packed_words(columns, bits)];
    emit(EncodedTensor { suffix: PACKED, dtype: Dtype::I32, shape, bytes: bytemuck::cast_slice(&packed) })?;
    let size = [rows as i64, columns as i64];
    emit(EncodedTensor { suffix: SHAPE, dtype: Dtype::I64, shape: vec![2], bytes: bytemuck::cast_slice(&size) })?;
    let Some(index) = matrix.group_index() else { return Ok(()) };
    let bytes = bytemuck::cast_slice(index);
    emit(EncodedTensor { suffix: GROUP_INDEX, dtype: Dtype::I32, shape: vec![columns], bytes })
}

fn impossible(linear: &LinearTensors<'_>) -> Error {
    linear.impossible(SHAPE, "the tensor holds an impossible size")
}
