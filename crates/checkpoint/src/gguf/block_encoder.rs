//! The canonical matrix into blocks of a tensor.

use half::{bf16, f16};
use kintsugi_runtime::{Error, ErrorCode, Result, ThreadPool};
use kintsugi_weights::{ElementType, GroupAxis, QuantizedMatrix, WeightMatrix};

use super::block_format::{BlockCodes, BlockContent, BlockGrid, BlockParts};
use super::{GGUF_TYPES, GgufType};

/// The smallest type that holds every value of `matrix` exactly, `None` when none of those that are written does.
pub fn exact_type(matrix: &QuantizedMatrix) -> Option<&'static GgufType> {
    let mut candidates: Vec<&'static GgufType> = GGUF_TYPES.iter().filter(|known| packer(known).is_some()).collect();
    candidates.sort_by_key(|known| known.block_bytes * 256 / known.block_elements);
    candidates.into_iter().find(|known| {
        let mut row_bytes = vec![0; row_bytes(known, matrix.columns()).unwrap_or(0)];
        (0..matrix.rows()).all(|row| pack_row(matrix, row, known, &mut row_bytes))
    })
}

/// Bytes of a row, `None` when it is no whole number of blocks.
pub(crate) fn row_bytes(gguf_type: &GgufType, columns: usize) -> Option<usize> {
    columns.is_multiple_of(gguf_type.block_elements).then(|| columns / gguf_type.block_elements * gguf_type.block_bytes)
}

/// The rows of `matrix` as blocks, row `i` being its row `order(i)`. Codes that the type holds exactly are packed as
/// they are, all else is rounded.
///
/// # Errors
/// `ERR_QUANTIZATION_UNSUPPORTED` for a type that is not written, or rows that are no whole blocks;
/// `ERR_VALUE_NOT_FINITE` for a weight that half precision cannot hold.
pub(crate) fn encode(
    matrix: &WeightMatrix,
    gguf_type: &'static GgufType,
    order: impl Fn(usize) -> usize + Sync + Send,
) -> Result<Vec<u8>> {
    let unsupported = |message: String| Err(Error::new(ErrorCode::QuantizationUnsupported, message));
    let Some(width) = row_bytes(gguf_type, matrix.columns()) else {
        return unsupported(format!(
            "rows of {} weights are no whole blocks of {}",
            matrix.columns(),
            gguf_type.block_elements
        ));
    };
    if !gguf_type.is_written() {
        return unsupported(format!("the type {} is not written", gguf_type.name));
    }
    let exact = match matrix {
        WeightMatrix::Quantized(codes) => {
            let mut row_bytes = vec![0; width];
            packer(gguf_type).is_some() && (0..codes.rows()).all(|row| pack_row(codes, row, gguf_type, &mut row_bytes))
        }
        WeightMatrix::Dense(_) => false,
    };
    let mut bytes = vec![0; matrix.rows() * width];
    ThreadPool::global().for_each_chunk(&mut bytes, width.max(1), |row, bytes| {
        let row = order(row);
        match matrix {
            WeightMatrix::Quantized(codes) if exact => {
                pack_row(codes, row, gguf_type, bytes);
            }
            _ => {
                let mut values = vec![0.0; matrix.columns()];
                matrix.row_to_f32(row, &mut values);
                round_row(&values, gguf_type, bytes);
            }
        }
    });
    let words = || bytes.chunks_exact(2).map(|word| u16::from_le_bytes([word[0], word[1]]));
    let too_large = match gguf_type.content {
        BlockContent::Float(ElementType::F16) => words().any(|word| !f16::from_bits(word).is_finite()),
        BlockContent::Float(ElementType::Bf16) => words().any(|word| !bf16::from_bits(word).is_finite()),
        _ => false,
    };
    if too_large {
        let message = format!("a weight is larger than {} can hold", gguf_type.name);
        return Err(Error::new(ErrorCode::ValueNotFinite, message).hint("Write it as BF16 or F32"));
    }
    Ok(bytes)
}

/// A vector in the type that GGUF keeps vectors in.
pub(crate) fn encode_vector(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn round_row(values: &[f32], gguf_type: &GgufType, bytes: &mut [u8]) {
    match gguf_type.content {
        BlockContent::Float(ElementType::F32) => {
            bytes.chunks_exact_mut(4).zip(values).for_each(|(out, value)| out.copy_from_slice(&value.to_le_bytes()));
        }
        BlockContent::Float(ElementType::F16) => {
            let halves = values.iter().map(|&value| f16::from_f32(value).to_le_bytes());
            bytes.chunks_exact_mut(2).zip(halves).for_each(|(out, half)| out.copy_from_slice(&half));
        }
        BlockContent::Float(ElementType::Bf16) => {
            let halves = values.iter().map(|&value| bf16::from_f32(value).to_le_bytes());
            bytes.chunks_exact_mut(2).zip(halves).for_each(|(out, half)| out.copy_from_slice(&half));
        }
        BlockContent::Codes(BlockCodes { round: Some(round), .. }) => {
            let blocks = bytes.chunks_exact_mut(gguf_type.block_bytes);
            blocks.zip(values.chunks_exact(gguf_type.block_elements)).for_each(|(block, values)| round(values, block));
        }
        BlockContent::Codes(_) | BlockContent::Other => {}
    }
}

type Pack = fn(&BlockParts<'_>, &mut [u8]) -> bool;

fn packer(gguf_type: &GgufType) -> Option<(BlockCodes, Pack)> {
    match gguf_type.content {
        BlockContent::Codes(codes) => codes.pack.map(|pack| (codes, pack)),
        _ => None,
    }
}

/// Packs a row into `bytes`; false when the type cannot hold it exactly, or its rows are no whole blocks.
fn pack_row(matrix: &QuantizedMatrix, row: usize, gguf_type: &GgufType, bytes: &mut [u8]) -> bool {
    let Some((target, pack)) = packer(gguf_type) else { return false };
    let columns = matrix.columns();
    let group = matrix.group_size().columns(columns);
    let fits = matrix.group_axis() == GroupAxis::Input
        && matrix.group_index().is_none()
        && matrix.code_table().is_none()
        && columns.is_multiple_of(gguf_type.block_elements)
        && group.is_multiple_of(target.group);
    if !fits {
        return false;
    }
    let groups = target.groups(gguf_type.block_elements);
    let mut codes = vec![0; gguf_type.block_elements];
    let mut scales = vec![0.0; groups];
    let mut offsets = vec![0.0; if target.has_offsets() { groups } else { 0 }];
    for (place, block) in bytes.chunks_exact_mut(gguf_type.block_bytes).enumerate() {
        let start = place * gguf_type.block_elements;
        for of_block in 0..groups {
            let inside = of_block * target.group..(of_block + 1) * target.group;
            let column = start + inside.start;
            let at = matrix.scale_index(row, column);
            let source = &matrix.codes()[row * columns + column..][..target.group];
            scales[of_block] = matrix.scales()[at];
            let taken = take_group(matrix, at, source, &target, &mut codes[inside]);
            match (taken, offsets.get_mut(of_block)) {
                (None, _) => return false,
                (Some(offset), Some(place)) => *place = offset,
                (Some(_), None) => {}
            }
        }
        if !pack(&BlockParts { codes: &mut codes, scales: &mut scales, offsets: &mut offsets }, block) {
            return false;
        }
    }
    true
}

/// The codes of a group on the grid of `target`, and the offset that goes with them; `None` when it has no such codes.
fn take_group(
    matrix: &QuantizedMatrix,
    at: usize,
    source: &[u8],
    target: &BlockCodes,
    codes: &mut [u8],
) -> Option<f32> {
    let zero = match matrix.zero_points() {
        Some(zero_points) => i32::from(zero_points[at]),
        None => 1 << (matrix.bits() - 1),
    };
    let most = (1i32 << target.bits) - 1;
    match (target.grid, matrix.offsets()) {
        (BlockGrid::Centered, None) => {
            let shift = (1 << (target.bits - 1)) - zero;
            for (code, &source) in codes.iter_mut().zip(source) {
                *code = u8::try_from(i32::from(source) + shift).ok().filter(|&code| i32::from(code) <= most)?;
            }
            Some(0.0)
        }
        (BlockGrid::Offset, offsets) if matrix.bits() <= target.bits => {
            codes.copy_from_slice(source);
            let Some(offsets) = offsets else {
                let scale = matrix.scales()[at];
                let offset = -(zero as f32 * scale);
                return (f64::from(offset) == -(f64::from(zero) * f64::from(scale))).then_some(offset);
            };
            Some(offsets[at])
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use kintsugi_weights::{GroupSize, QuantizedParts};

    use super::super::block_decoder::decode;
    use super::*;

    /// Two rows of a superblock each, on the grid of `codes`, with scales that the type can hold.
    fn matrix(codes: &BlockCodes) -> QuantizedMatrix {
        let (rows, columns) = (2, 256);
        let groups = rows * columns / codes.group;
        let small = |place: usize, factor: f32| ((place * 11 + 5) % 60) as f32 * factor;
        QuantizedMatrix::new(QuantizedParts {
            rows,
            columns,
            bits: codes.bits,
            group_size: GroupSize::Columns(codes.group),
            codes: (0..rows * columns).map(|place| (place * 29 % (1 << codes.bits)) as u8).collect(),
            scales: (0..groups).map(|place| small(place, 0.0625)).collect(),
            scale_type: ElementType::F16,
            offsets: codes.has_offsets().then(|| (0..groups).map(|place| -small(place + 3, 0.125)).collect()),
            ..QuantizedParts::default()
        })
        .unwrap()
    }

    #[test]
    fn what_is_packed_is_unpacked_bit_for_bit() {
        let written = GGUF_TYPES.iter().filter_map(|known| Some((known, packer(known)?.0)));
        let mut count = 0;
        for (known, codes) in written {
            let source = matrix(&codes);
            let bytes = encode(&WeightMatrix::Quantized(source.clone()), known, |row| 1 - row).unwrap();
            let WeightMatrix::Quantized(found) = decode("w", known, 2, 256, &bytes).unwrap() else { panic!() };
            let turned = |values: Vec<f32>| [&values[256..], &values[..256]].concat();
            assert_eq!(found.to_f32(), turned(source.to_f32()), "{}", known.name);
            assert_eq!(found.codes()[..256], source.codes()[256..], "{}", known.name);
            count += 1;
        }
        assert_eq!(count, 5);
    }

    #[test]
    fn blocks_of_one_value_and_of_tiny_and_huge_values_stay_finite() {
        let types = GGUF_TYPES.iter().filter(|known| packer(known).is_some());
        for known in types {
            for value in [0.0, -0.0, 3.5, -3.5, 1e-30, -1e-42, 1e30, f32::MAX, f32::MIN] {
                let source = WeightMatrix::Dense(kintsugi_weights::DenseMatrix::from_f32(1, 256, vec![value; 256]));
                let bytes = encode(&source, known, |row| row).unwrap();
                let found = decode("w", known, 1, 256, &bytes).unwrap().to_f32();
                if (1e-3..1e3).contains(&value.abs()) {
                    assert!(
                        found.iter().all(|found| (found - value).abs() < 0.07 * value.abs()),
                        "{} {value}",
                        known.name
                    );
                }
            }
        }
    }

    #[test]
    fn half_precision_refuses_what_it_cannot_hold() {
        let source = WeightMatrix::Dense(kintsugi_weights::DenseMatrix::from_f32(1, 2, vec![1.0, 1e5]));
        let half = GgufType::written("F16").unwrap();
        assert_eq!(encode(&source, half, |row| row).unwrap_err().code, ErrorCode::ValueNotFinite);
    }
}
