use std::sync::Arc;

use half::{bf16, f16};
use kintsugi_runtime::{Error, ErrorCode, Result, ThreadPool};
use kintsugi_weights::{
    CodeTable, DenseMatrix, DenseValues, ElementType, FactorCodes, GroupAxis, LinearWeight, LowRank, QuantizedMatrix,
    WeightMatrix,
};

use crate::Precision;
use crate::aligned_bytes::AlignedBytes;
use crate::code_fields::{CodeFields, Piece};
use crate::grid_parameters::{GridOrigin, GridParameters};
use crate::packed_low_rank::{FoldedMatrix, PackedFactors};
use crate::packed_matrix::{ColumnLayout, Compensation, IntegerCodes, PackedMatrix, PanelEncoding, Section};
use crate::vector::LANES;

/// Packs a Linear: matrix, compensation and bias.
pub(crate) fn pack_linear(weight: &LinearWeight, precision: Precision, pool: &ThreadPool) -> Result<PackedMatrix> {
    let (rows, columns) = (weight.matrix.rows(), weight.matrix.columns());
    if let Some(bias) = weight.bias.as_ref().filter(|bias| bias.len() != rows) {
        return Err(mismatch(format!("the bias of {rows} outputs has {} values", bias.len())));
    }
    let low_rank = match &weight.low_rank {
        Some(factors) if factors.out_features() != rows || factors.in_features() != columns => {
            let (b, a) = (factors.out_features(), factors.in_features());
            return Err(mismatch(format!("a {b}×{a} low-rank update does not fit a {rows}×{columns} matrix")));
        }
        Some(factors) if factors.rank() > 0 => Some(factor_matrices(factors)),
        _ => None,
    };
    pack_panels(&weight.matrix, low_rank, weight.bias.clone(), precision, pool)
}

/// Packs both factors of an update as matrices of their own.
pub(crate) fn pack_factors(factors: &LowRank, pool: &ThreadPool) -> Result<PackedFactors> {
    let (a, b) = factor_matrices(factors);
    let (rows, columns) = (a.rows(), a.columns());
    // Codes stay in their groups.
    let folds = match &a {
        WeightMatrix::Dense(_) => {
            [4, 2].into_iter().find(|folds| rows * folds <= LANES && columns.is_multiple_of(*folds))
        }
        WeightMatrix::Quantized(_) => None,
    };
    let a = match (&a, folds) {
        (WeightMatrix::Dense(a), Some(folds)) => WeightMatrix::Dense(fold(a, folds)),
        _ => a,
    };
    let a = FoldedMatrix { matrix: pack_factor(&a, pool)?, rows, folds: folds.unwrap_or(1) };
    Ok(PackedFactors { a, b: pack_factor(&b, pool)? })
}

/// The matrix of a [`FoldedMatrix`], `[32, columns / folds]`.
fn fold(matrix: &DenseMatrix, folds: usize) -> DenseMatrix {
    fn folded<T: Copy + Default>(values: &[T], columns: usize, folds: usize) -> Vec<T> {
        let width = columns / folds;
        let mut out = vec![T::default(); LANES * width];
        for (row, values) in values.chunks_exact(columns).enumerate() {
            for (run, values) in values.chunks_exact(width).enumerate() {
                out[(run * LANES / folds + row) * width..][..width].copy_from_slice(values);
            }
        }
        out
    }
    let columns = matrix.columns();
    let values = match matrix.values() {
        DenseValues::F32(values) => DenseValues::F32(folded(values, columns, folds)),
        DenseValues::F16(values) => DenseValues::F16(folded(values, columns, folds)),
        DenseValues::Bf16(values) => DenseValues::Bf16(folded(values, columns, folds)),
    };
    DenseMatrix::new(LANES, columns / folds, values)
}

/// A factor for products in f32.
fn pack_factor(factor: &WeightMatrix, pool: &ThreadPool) -> Result<PackedMatrix> {
    pack_panels(factor, None, None, Precision::F32, pool)
}

/// A of a compensation. Beside a matrix that reads x in int8 it reads the same int8, as codes of 8 bits in the blocks of the
/// matrix: x is then packed once for both.
fn pack_projection(a: &WeightMatrix, main: &Section, pool: &ThreadPool) -> Result<PackedMatrix> {
    if main.integers.is_none() {
        return pack_factor(a, pool);
    }
    let (rows, columns, encoding) = (a.rows(), a.columns(), PanelEncoding::Bits8);
    let mut layout = main.layout.clone().in_steps_of(encoding.step_columns());
    (0..).zip(&mut layout.blocks).for_each(|(group, block)| block.group = group);
    let section = Section {
        encoding,
        grid: Some(GridParameters { scale_type: ElementType::F32, origin: GridOrigin::Centre }),
        table: CodeTable::FP4,
        integers: IntegerCodes::of(None),
        offset: 0,
        layout,
    };
    let (codes, scales) = round_to_codes(&a.to_f32(), columns, &section.layout);
    let codes = CodedRows {
        rows,
        columns,
        groups: section.layout.blocks.len(),
        bits: 8,
        table: false,
        codes: &codes,
        scales: &scales,
        zero_points: None,
        offsets: None,
    };
    let panel_bytes = section.bytes();
    let mut panels = AlignedBytes::zeroed(panels_bytes(rows, columns, panel_bytes)?);
    pool.for_each_chunk(panels.as_mut_slice(), panel_bytes, |panel, bytes| write_codes(&codes, &section, panel, bytes));
    let (precision, compensation, bias) = (Precision::Fast, None, None);
    Ok(PackedMatrix { rows, columns, precision, main: section, compensation, bias, panel_bytes, panels })
}

/// Rounds rows to nearest, symmetrically, to codes of 8 bits around 128, with a scale for each block of a row. What is not
/// finite makes its row of the block NaN.
fn round_to_codes(values: &[f32], columns: usize, layout: &ColumnLayout) -> (Vec<u8>, Vec<f32>) {
    let mut codes = vec![0; values.len()];
    let mut scales = Vec::with_capacity(values.len() / columns * layout.blocks.len());
    for (row, codes) in values.chunks_exact(columns).zip(codes.chunks_exact_mut(columns)) {
        for block in &layout.blocks {
            let members = || (block.start..block.start + block.columns).map(|place| layout.column(place));
            let finite = members().all(|column| row[column].is_finite());
            let largest = members().fold(0.0f32, |largest, column| largest.max(row[column].abs()));
            // The least normal number keeps quotients finite.
            let scale = if finite { (largest / 127.0).max(f32::MIN_POSITIVE) } else { f32::NAN };
            scales.push(scale);
            for column in members() {
                // A quotient that is NaN becomes the code of zero.
                codes[column] = ((row[column] / scale).round_ties_even() as i32 + 128) as u8;
            }
        }
    }
    (codes, scales)
}

/// A `[rank, in]` and B `[out, rank]` as they are stored: in codes, or in the type that they are rounded to.
fn factor_matrices(factors: &LowRank) -> (WeightMatrix, WeightMatrix) {
    if let Some(FactorCodes { b, a }) = factors.codes() {
        return (WeightMatrix::Quantized(a.clone()), WeightMatrix::Quantized(b.clone()));
    }
    let matrix = |rows, columns, values: &[f32]| {
        let values = match factors.factor_type() {
            ElementType::F32 => DenseValues::F32(values.to_vec()),
            ElementType::F16 => DenseValues::F16(values.iter().map(|&value| f16::from_f32(value)).collect()),
            ElementType::Bf16 => DenseValues::Bf16(values.iter().map(|&value| bf16::from_f32(value)).collect()),
        };
        WeightMatrix::Dense(DenseMatrix::new(rows, columns, values))
    };
    (
        matrix(factors.rank(), factors.in_features(), factors.a()),
        matrix(factors.out_features(), factors.rank(), factors.b()),
    )
}

/// A matrix with A and B of its compensation.
fn pack_panels(
    matrix: &WeightMatrix,
    low_rank: Option<(WeightMatrix, WeightMatrix)>,
    bias: Option<Vec<f32>>,
    precision: Precision,
    pool: &ThreadPool,
) -> Result<PackedMatrix> {
    let (rows, columns) = (matrix.rows(), matrix.columns());
    if rows == 0 || columns == 0 || u32::try_from(columns).is_err() {
        return Err(mismatch(format!("a {rows}×{columns} matrix cannot be multiplied with")));
    }
    let widened;
    let matrix = match matrix {
        // Groups along the outputs have no panel of their own yet.
        WeightMatrix::Quantized(quantized) if quantized.group_axis() == GroupAxis::Output => {
            widened = WeightMatrix::Dense(DenseMatrix::from_f32(rows, columns, quantized.to_f32()));
            &widened
        }
        matrix => matrix,
    };
    let main = section(matrix, precision, 0);
    let (a, b) = low_rank.unzip();
    let a = a.map(|a| pack_projection(&a, &main, pool)).transpose()?;
    let b_section = b.as_ref().map(|b| section(b, Precision::F32, main.bytes()));
    let panel_bytes = main.bytes() + b_section.as_ref().map_or(0, Section::bytes);
    let mut panels = AlignedBytes::zeroed(panels_bytes(rows, columns, panel_bytes)?);
    pool.for_each_chunk(panels.as_mut_slice(), panel_bytes, |panel, bytes| {
        write(matrix, &main, panel, bytes);
        if let (Some(b), Some(section)) = (&b, &b_section) {
            write(b, section, panel, bytes);
        }
    });
    let compensation = a.zip(b_section).map(|(a, b)| Compensation { a: Arc::new(a), borrowed: false, b });
    Ok(PackedMatrix { rows, columns, precision, main, compensation, bias, panel_bytes, panels })
}

/// Bytes of all panels of a matrix.
fn panels_bytes(rows: usize, columns: usize, panel_bytes: usize) -> Result<usize> {
    panel_bytes
        .checked_mul(rows.div_ceil(LANES))
        .filter(|&bytes| isize::try_from(bytes).is_ok())
        .ok_or_else(|| mismatch(format!("a {rows}×{columns} matrix does not fit into memory")))
}

/// How a matrix lies in its panels, from that byte of each on.
fn section(matrix: &WeightMatrix, precision: Precision, offset: usize) -> Section {
    match matrix {
        WeightMatrix::Dense(matrix) => dense_section(matrix, offset),
        WeightMatrix::Quantized(matrix) => quantized_section(matrix, precision, offset),
    }
}

fn dense_section(matrix: &DenseMatrix, offset: usize) -> Section {
    let encoding = PanelEncoding::of_element(matrix.element_type());
    let layout = ColumnLayout::plain(matrix.columns(), encoding.step_columns());
    Section { encoding, layout, grid: None, table: CodeTable::FP4, integers: None, offset }
}

fn quantized_section(matrix: &QuantizedMatrix, precision: Precision, offset: usize) -> Section {
    let integers = if precision == Precision::Fast { IntegerCodes::of(matrix.code_table()) } else { None };
    let layout = ColumnLayout::grouped(
        matrix.columns(),
        matrix.groups(),
        PanelEncoding::Table4.step_columns(),
        if integers.is_some() { ColumnLayout::INTEGER_BLOCK_COLUMNS } else { ColumnLayout::BLOCK_COLUMNS },
        |column| matrix.group_of(column),
        matrix.group_index().is_some(),
    );
    let encoding = match matrix.code_table() {
        Some(_) => PanelEncoding::Table4,
        None => smallest_encoding(matrix.bits(), &layout),
    };
    let layout = layout.in_steps_of(encoding.step_columns());
    // A scale that its declared type does not hold exactly (NaN among them) is kept as it is.
    let declared = matrix.scale_type();
    let exact = matrix.scales().iter().all(|&scale| declared.round(scale) == scale);
    let scale_type = if exact { declared } else { ElementType::F32 };
    let origin = match (matrix.zero_points(), matrix.offsets()) {
        (Some(_), _) => GridOrigin::ZeroPoints,
        (None, Some(_)) => GridOrigin::Offsets,
        (None, None) => GridOrigin::Centre,
    };
    let table = matrix.code_table().copied().unwrap_or(CodeTable::FP4);
    Section { encoding, layout, grid: Some(GridParameters { scale_type, origin }), table, integers, offset }
}

/// The encoding of integer codes that takes the fewest bytes, and of those the fewest columns. A step of 3 bits is 32
/// columns: in blocks of 16, such as Q3_K has, it would be padded to 6 bits a code, and steps of 4 bits are smaller.
fn smallest_encoding(bits: u8, layout: &ColumnLayout) -> PanelEncoding {
    let size = |encoding: &PanelEncoding| {
        let steps = layout.steps_of(encoding.step_columns());
        (steps * encoding.step_bytes(), steps * encoding.step_columns())
    };
    PanelEncoding::of_bits(bits).min_by_key(size).unwrap_or(PanelEncoding::Bits8)
}

/// Writes the rows of a panel.
fn write(matrix: &WeightMatrix, section: &Section, panel: usize, bytes: &mut [u8]) {
    match matrix {
        WeightMatrix::Dense(matrix) => write_dense(matrix, section, panel, bytes),
        WeightMatrix::Quantized(matrix) => write_codes(&CodedRows::of(matrix), section, panel, bytes),
    }
}

/// Writes the rows of a panel. Rows past the end stay zero.
fn write_dense(matrix: &DenseMatrix, section: &Section, panel: usize, bytes: &mut [u8]) {
    let first = panel * LANES;
    let rows = LANES.min(matrix.rows() - first);
    let columns = matrix.columns();
    let bytes = &mut bytes[section.offset..][..section.bytes()];
    for row in 0..rows {
        let range = (first + row) * columns..(first + row + 1) * columns;
        match matrix.values() {
            DenseValues::F32(values) => {
                for (column, value) in values[range].iter().enumerate() {
                    bytes[(column * LANES + row) * 4..][..4].copy_from_slice(&value.to_le_bytes());
                }
            }
            DenseValues::F16(values) => {
                for (column, value) in values[range].iter().enumerate() {
                    bytes[(column * LANES + row) * 2..][..2].copy_from_slice(&value.to_le_bytes());
                }
            }
            DenseValues::Bf16(values) => {
                for (column, value) in values[range].iter().enumerate() {
                    let word = (column / 2 * LANES + row) * 4;
                    bytes[word + column % 2 * 2..][..2].copy_from_slice(&value.to_le_bytes());
                }
            }
        }
    }
}

/// Rows of codes with a scale for each group of a row.
struct CodedRows<'a> {
    rows: usize,
    columns: usize,
    /// Of a row.
    groups: usize,
    bits: u8,
    /// Whether codes stand for the values of a table.
    table: bool,
    /// `[rows, columns]`
    codes: &'a [u8],
    /// `[rows, groups]`, as zero points and offsets.
    scales: &'a [f32],
    zero_points: Option<&'a [u8]>,
    offsets: Option<&'a [f32]>,
}

impl<'a> CodedRows<'a> {
    fn of(matrix: &'a QuantizedMatrix) -> Self {
        CodedRows {
            rows: matrix.rows(),
            columns: matrix.columns(),
            groups: matrix.groups(),
            bits: matrix.bits(),
            table: matrix.code_table().is_some(),
            codes: matrix.codes(),
            scales: matrix.scales(),
            zero_points: matrix.zero_points(),
            offsets: matrix.offsets(),
        }
    }
}

/// Writes the rows of a panel: codes, scales and zero points of each block. Padding is the code of value zero, with
/// scale zero in the rows past the end.
fn write_codes(matrix: &CodedRows<'_>, section: &Section, panel: usize, bytes: &mut [u8]) {
    let (Some(grid), Some(bits)) = (section.grid, section.encoding.code_bits()) else { return };
    let first = panel * LANES;
    let rows = LANES.min(matrix.rows - first);
    let (columns, groups) = (matrix.columns, matrix.groups);
    let step_columns = section.encoding.step_columns();
    let centre = 1u32 << (bits - 1);
    // Codes of fewer bits move to the middle of the range, so that their centre is the same.
    let shift = centre - (1 << (matrix.bits - 1));
    let fields = match section.integers {
        Some(_) => CodeFields::of_bytes(bits),
        None => CodeFields::of_halves(bits),
    };
    // With its top bit flipped, a code minus its centre is a two's complement.
    let flip = if section.integers.is_none() && !matrix.table { centre } else { 0 };
    let pieces = step_pieces(fields);

    let mut at = section.offset;
    for (block, &steps) in section.layout.blocks.iter().zip(&section.layout.steps) {
        for step in 0..steps as usize {
            let start = block.start + step * step_columns;
            let count = step_columns.min(block.start + block.columns - start);
            for row in 0..LANES {
                let mut values = [centre ^ flip; CodeFields::MOST_COLUMNS];
                if row < rows {
                    let codes = &matrix.codes[(first + row) * columns..][..columns];
                    for (value, place) in values.iter_mut().zip(start..start + count) {
                        *value = (u32::from(codes[section.layout.column(place)]) + shift) ^ flip;
                    }
                }
                let mut words = [0; CodeFields::MOST_WORDS];
                for &(column, unit_shift, piece) in &pieces {
                    words[piece.word] |= (values[column] & piece.mask) << (piece.shift + unit_shift);
                }
                for (word, value) in words[..fields.words()].iter().enumerate() {
                    bytes[at + (word * LANES + row) * 4..][..4].copy_from_slice(&value.to_le_bytes());
                }
            }
            at += fields.step_bytes();
        }
        for row in 0..rows {
            let scale = matrix.scales[(first + row) * groups + block.group];
            let size = grid.scale_type.bits() / 8;
            let out = &mut bytes[at + row * size..][..size];
            match grid.scale_type {
                ElementType::F32 => out.copy_from_slice(&scale.to_le_bytes()),
                ElementType::F16 => out.copy_from_slice(&f16::from_f32(scale).to_le_bytes()),
                ElementType::Bf16 => out.copy_from_slice(&bf16::from_f32(scale).to_le_bytes()),
            }
        }
        at += LANES * grid.scale_type.bits() / 8;
        for row in 0..rows {
            let index = (first + row) * groups + block.group;
            match (grid.origin, matrix.zero_points, matrix.offsets) {
                // Relative to the centre, as a signed byte.
                (GridOrigin::ZeroPoints, Some(zero_points), _) => {
                    let zero = u32::from(zero_points[index]) + shift;
                    bytes[at + row] = zero.wrapping_sub(centre) as u8;
                }
                // Codes are taken minus their centre.
                (GridOrigin::Offsets, _, Some(offsets)) => {
                    let half_range = f32::from(1u16 << (matrix.bits - 1));
                    let offset = half_range.mul_add(matrix.scales[index], offsets[index]);
                    bytes[at + 4 * row..][..4].copy_from_slice(&offset.to_le_bytes());
                }
                _ => {}
            }
        }
        at += LANES * grid.origin.bytes();
    }
}

/// The pieces of the codes of a step: the column of each, and how far its unit is from the lowest of the word.
fn step_pieces(fields: CodeFields) -> Vec<(usize, u32, Piece)> {
    let mut list = Vec::new();
    for column in 0..fields.columns() {
        let pieces = fields.pieces(column / fields.units());
        let unit_shift = (column % fields.units()) as u32 * fields.unit_bits();
        list.extend((0..pieces.count()).map(|index| (column, unit_shift, pieces.get(index))));
    }
    list
}

fn mismatch(message: String) -> Error {
    Error::new(ErrorCode::ShapeMismatch, message).subject("LinearWeight")
}
