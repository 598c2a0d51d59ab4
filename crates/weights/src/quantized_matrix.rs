use std::ops::Range;

use kintsugi_runtime::{Error, ErrorCode, Result};
use serde::{Deserialize, Serialize};

use crate::{CodeTable, ElementType};

/// Widths that codes have.
pub const CODE_BITS: [u8; 6] = [2, 3, 4, 5, 6, 8];

/// How many consecutive columns of a row share a scale and a zero point.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum GroupSize {
    /// That many columns; the last group of a row may be shorter.
    Columns(usize),
    /// One group per row.
    #[default]
    WholeRow,
}

impl GroupSize {
    /// Columns of a full group in a matrix of `columns` columns.
    pub fn columns(self, columns: usize) -> usize {
        match self {
            GroupSize::Columns(size) => size.min(columns).max(1),
            GroupSize::WholeRow => columns.max(1),
        }
    }

    /// Groups per row of a matrix of `columns` columns.
    pub fn groups(self, columns: usize) -> usize {
        columns.div_ceil(self.columns(columns))
    }
}

/// Which way the weights of a group lie.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GroupAxis {
    /// Consecutive inputs (columns) of one output: what every common file format holds.
    #[default]
    Input,
    /// Consecutive outputs (rows) of one input: an input with large weights has scales of its own
    /// (arXiv 2309.15531).
    Output,
}

/// A matrix of small codes, `[rows, columns]`, with a scale per group:
///
/// - `(code − zero) · scale`, where the zero point is `2^(bits−1)` on a symmetric grid;
/// - `code · scale + offset` where groups have offsets;
/// - `table[code] · scale` where codes stand for the values of a [`CodeTable`].
///
/// Canonical: independent of the CPU and of the file format. Groups are runs of `group_size` columns of a row, or of
/// rows of a column ([`GroupAxis`]); `group_index` says where the solver assigned columns to groups in another order.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantizedMatrix {
    parts: QuantizedParts,
}

/// The parts of a [`QuantizedMatrix`], named.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct QuantizedParts {
    /// Rows (outputs).
    pub rows: usize,
    /// Columns (inputs).
    pub columns: usize,
    /// Width of a code.
    pub bits: u8,
    /// Weights per group along [`QuantizedParts::group_axis`].
    pub group_size: GroupSize,
    /// Which way groups lie.
    pub group_axis: GroupAxis,
    /// `[rows, columns]`, one code per byte.
    pub codes: Vec<u8>,
    /// `[rows, groups]`, or `[groups, columns]` where groups lie along the outputs; already rounded to `scale_type`.
    pub scales: Vec<f32>,
    /// The type that scales are stored in.
    pub scale_type: ElementType,
    /// Like `scales`; `None` on a symmetric grid, whose zero point is `2^(bits−1)`.
    pub zero_points: Option<Vec<u8>>,
    /// Like `scales`: what is added after the scale, in place of zero points.
    pub offsets: Option<Vec<f32>>,
    /// What codes of 4 bits stand for, in place of integers.
    pub code_table: Option<CodeTable>,
    /// `[columns]`: the group of each column, where it is not `c / groupSize`.
    pub group_index: Option<Vec<u32>>,
}

impl QuantizedParts {
    /// Groups along the axis: per row, or per column.
    pub fn groups(&self) -> usize {
        match self.group_axis {
            GroupAxis::Input => self.group_size.groups(self.columns),
            GroupAxis::Output => self.group_size.groups(self.rows),
        }
    }

    /// How many scales there are.
    pub fn scale_count(&self) -> usize {
        match self.group_axis {
            GroupAxis::Input => self.rows * self.groups(),
            GroupAxis::Output => self.groups() * self.columns,
        }
    }
}

impl QuantizedMatrix {
    /// Checks the parts against each other and takes them.
    ///
    /// # Errors
    /// `ERR_SHAPE_MISMATCH` when a length, a code, a zero point or a group index does not fit, or when parts exclude
    /// each other.
    pub fn new(parts: QuantizedParts) -> Result<Self> {
        match Self::fault(&parts) {
            None => Ok(QuantizedMatrix { parts }),
            Some(message) => Err(Error::new(ErrorCode::ShapeMismatch, message).subject("QuantizedMatrix")),
        }
    }

    fn fault(parts: &QuantizedParts) -> Option<String> {
        let &QuantizedParts { rows, columns, bits, .. } = parts;
        if !CODE_BITS.contains(&bits) {
            return Some(format!("codes have 2, 3, 4, 5, 6 or 8 bits, not {bits}"));
        }
        if rows.checked_mul(columns) != Some(parts.codes.len()) {
            return Some(format!("a {rows}×{columns} matrix has {} codes", parts.codes.len()));
        }
        let scales = parts.scale_count();
        if parts.scales.len() != scales {
            return Some(format!("{scales} groups have {} scales", parts.scales.len()));
        }
        let limit = 1u16 << bits;
        if let Some(code) = parts.codes.iter().find(|&&code| u16::from(code) >= limit) {
            return Some(format!("code {code} does not fit into {bits} bits"));
        }
        if let Some(zero_points) = &parts.zero_points {
            if zero_points.len() != scales {
                return Some(format!("{scales} groups have {} zero points", zero_points.len()));
            }
            if let Some(zero) = zero_points.iter().find(|&&zero| u16::from(zero) >= limit) {
                return Some(format!("zero point {zero} does not fit into {bits} bits"));
            }
        }
        if let Some(offsets) = parts.offsets.as_ref().filter(|offsets| offsets.len() != scales) {
            return Some(format!("{scales} groups have {} offsets", offsets.len()));
        }
        let grids = [parts.zero_points.is_some(), parts.offsets.is_some(), parts.code_table.is_some()];
        if grids.into_iter().filter(|&there| there).count() > 1 {
            return Some("zero points, offsets and a code table exclude each other".to_string());
        }
        if parts.code_table.is_some() && bits != 4 {
            return Some(format!("a code table is for codes of 4 bits, not {bits}"));
        }
        if let Some(index) = &parts.group_index {
            let groups = parts.groups();
            if parts.group_axis == GroupAxis::Output {
                return Some("a group index is for groups along the inputs".to_string());
            }
            if index.len() != columns || index.iter().any(|&group| group as usize >= groups) {
                return Some(format!("the group index does not map {columns} columns to {groups} groups"));
            }
        }
        None
    }

    /// Its parts.
    pub fn parts(&self) -> &QuantizedParts {
        &self.parts
    }

    /// Its parts, to keep or to change.
    pub fn into_parts(self) -> QuantizedParts {
        self.parts
    }

    /// Number of rows (outputs).
    pub fn rows(&self) -> usize {
        self.parts.rows
    }

    /// Number of columns (inputs).
    pub fn columns(&self) -> usize {
        self.parts.columns
    }

    /// Width of a code in bits.
    pub fn bits(&self) -> u8 {
        self.parts.bits
    }

    /// Weights per group.
    pub fn group_size(&self) -> GroupSize {
        self.parts.group_size
    }

    /// Which way groups lie.
    pub fn group_axis(&self) -> GroupAxis {
        self.parts.group_axis
    }

    /// Groups along the axis: per row, or per column.
    pub fn groups(&self) -> usize {
        self.parts.groups()
    }

    /// One code per byte, `[rows, columns]`.
    pub fn codes(&self) -> &[u8] {
        &self.parts.codes
    }

    /// `[rows, groups]` or `[groups, columns]`, exactly as stored.
    pub fn scales(&self) -> &[f32] {
        &self.parts.scales
    }

    /// The type that scales are stored in.
    pub fn scale_type(&self) -> ElementType {
        self.parts.scale_type
    }

    /// Like the scales, or `None` where there are none.
    pub fn zero_points(&self) -> Option<&[u8]> {
        self.parts.zero_points.as_deref()
    }

    /// Like the scales, or `None` where there are none.
    pub fn offsets(&self) -> Option<&[f32]> {
        self.parts.offsets.as_deref()
    }

    /// What codes stand for, where they are not integers.
    pub fn code_table(&self) -> Option<&CodeTable> {
        self.parts.code_table.as_ref()
    }

    /// The group of each column where it is not `c / groupSize`.
    pub fn group_index(&self) -> Option<&[u32]> {
        self.parts.group_index.as_deref()
    }

    /// Whether values are `(code − 2^(bits−1)) · scale`.
    pub fn is_symmetric(&self) -> bool {
        self.parts.zero_points.is_none() && self.parts.offsets.is_none() && self.parts.code_table.is_none()
    }

    /// Where the scale, zero point or offset of a weight is.
    pub fn scale_index(&self, row: usize, column: usize) -> usize {
        match self.parts.group_axis {
            GroupAxis::Input => row * self.groups() + self.group_of(column),
            GroupAxis::Output => row / self.parts.group_size.columns(self.parts.rows) * self.parts.columns + column,
        }
    }

    /// The zero point at a place of the scales.
    pub fn zero_point(&self, scale_index: usize) -> u8 {
        match &self.parts.zero_points {
            Some(zero_points) => zero_points[scale_index],
            None => 1 << (self.parts.bits - 1),
        }
    }

    /// The group that column `column` belongs to, where groups lie along the inputs.
    pub fn group_of(&self, column: usize) -> usize {
        match &self.parts.group_index {
            Some(index) => index[column] as usize,
            None => column / self.parts.group_size.columns(self.parts.columns),
        }
    }

    /// Writes row `row` as f32 into `out` (`columns` long).
    pub fn row_to_f32(&self, row: usize, out: &mut [f32]) {
        let parts = &self.parts;
        let codes = &parts.codes[row * parts.columns..(row + 1) * parts.columns];
        let first = match parts.group_axis {
            GroupAxis::Input => row * self.groups(),
            GroupAxis::Output => self.scale_index(row, 0),
        };
        for (column, (value, &code)) in out.iter_mut().zip(codes).enumerate() {
            let at = match parts.group_axis {
                GroupAxis::Input => first + self.group_of(column),
                GroupAxis::Output => first + column,
            };
            let scale = parts.scales[at];
            *value = match (&parts.code_table, &parts.offsets) {
                (Some(table), _) => table.values()[usize::from(code)] * scale,
                (None, Some(offsets)) => f32::from(code) * scale + offsets[at],
                (None, None) => (f32::from(code) - f32::from(self.zero_point(at))) * scale,
            };
        }
    }

    /// All values as f32, row-major.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.parts.rows * self.parts.columns];
        for (row, values) in out.chunks_exact_mut(self.parts.columns.max(1)).enumerate() {
            self.row_to_f32(row, values);
        }
        out
    }

    /// Every value times `factor`: scales and offsets are. Where their type does not hold the products exactly, they
    /// become f32.
    #[must_use]
    pub fn scaled(&self, factor: f32) -> QuantizedMatrix {
        let mut parts = self.parts.clone();
        let mut exact = true;
        for value in parts.scales.iter_mut().chain(parts.offsets.iter_mut().flatten()) {
            *value *= factor;
            exact &= parts.scale_type.round(*value) == *value;
        }
        if !exact {
            parts.scale_type = ElementType::F32;
        }
        QuantizedMatrix { parts }
    }

    /// The first `rows` rows; groups must lie along the inputs.
    #[must_use]
    pub fn leading_rows(&self, rows: usize) -> QuantizedMatrix {
        self.part(0..rows.min(self.rows()), self.columns())
    }

    /// Some of the rows; groups must lie along the inputs.
    ///
    /// # Panics
    /// When there are no such rows.
    #[must_use]
    pub fn some_rows(&self, rows: Range<usize>) -> QuantizedMatrix {
        assert!(rows.end <= self.rows(), "{} rows have no rows {rows:?}", self.rows());
        self.part(rows, self.columns())
    }

    /// The first `columns` columns; groups must be runs of columns.
    #[must_use]
    pub fn leading_columns(&self, columns: usize) -> QuantizedMatrix {
        assert!(self.parts.group_index.is_none(), "groups are runs of columns");
        self.part(0..self.rows(), columns.min(self.columns()))
    }

    fn part(&self, rows: Range<usize>, columns: usize) -> QuantizedMatrix {
        let parts = &self.parts;
        assert_eq!(parts.group_axis, GroupAxis::Input, "groups lie along the inputs");
        // A whole row stays a group of the length that it had.
        let size = parts.group_size.columns(parts.columns);
        let (before, after) = (parts.groups(), columns.div_ceil(size));
        fn take<T: Copy>(values: &[T], width: usize, rows: &Range<usize>, columns: usize) -> Vec<T> {
            let rows = values.chunks_exact(width.max(1)).skip(rows.start).take(rows.len());
            rows.flat_map(|row| &row[..columns]).copied().collect()
        }
        QuantizedMatrix {
            parts: QuantizedParts {
                rows: rows.len(),
                columns,
                bits: parts.bits,
                group_size: match parts.group_size {
                    GroupSize::WholeRow => GroupSize::Columns(size),
                    columns => columns,
                },
                group_axis: parts.group_axis,
                codes: take(&parts.codes, parts.columns, &rows, columns),
                scales: take(&parts.scales, before, &rows, after),
                scale_type: parts.scale_type,
                zero_points: parts.zero_points.as_ref().map(|zeros| take(zeros, before, &rows, after)),
                offsets: parts.offsets.as_ref().map(|offsets| take(offsets, before, &rows, after)),
                code_table: parts.code_table,
                group_index: parts.group_index.clone(),
            },
        }
    }

    /// Bits that this matrix takes when stored: codes, scales, zero points, offsets (in the type of the scales) and
    /// group index.
    pub fn stored_bits(&self) -> u64 {
        let bits = u64::from(self.parts.bits);
        let scales = self.parts.scales.len() as u64;
        let scale_bits = self.parts.scale_type.bits() as u64;
        let zero_points = if self.parts.zero_points.is_some() { scales * bits } else { 0 };
        let offsets = if self.parts.offsets.is_some() { scales * scale_bits } else { 0 };
        let index = if self.parts.group_index.is_some() { self.parts.columns as u64 * 32 } else { 0 };
        self.parts.codes.len() as u64 * bits + scales * scale_bits + zero_points + offsets + index
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts() -> QuantizedParts {
        QuantizedParts {
            rows: 2,
            columns: 5,
            bits: 2,
            group_size: GroupSize::Columns(3),
            codes: vec![0, 1, 2, 3, 0, 3, 2, 1, 0, 1],
            scales: vec![0.5, 2.0, 1.0, 4.0],
            scale_type: ElementType::F16,
            zero_points: Some(vec![1, 0, 2, 3]),
            ..QuantizedParts::default()
        }
    }

    #[test]
    fn values_follow_the_formula_with_a_ragged_last_group() {
        let matrix = QuantizedMatrix::new(parts()).unwrap();
        assert_eq!(matrix.groups(), 2);
        assert_eq!(matrix.to_f32(), [-0.5, 0.0, 0.5, 6.0, 0.0, 1.0, 0.0, -1.0, -12.0, -8.0]);
        assert_eq!(matrix.stored_bits(), 10 * 2 + 4 * 16 + 4 * 2);
    }

    #[test]
    fn a_group_index_moves_columns_between_groups() {
        let mut parts = parts();
        parts.group_index = Some(vec![1, 0, 1, 0, 0]);
        let matrix = QuantizedMatrix::new(parts).unwrap();
        assert_eq!(matrix.to_f32()[..5], [0.0, 0.0, 4.0, 1.0, -0.5]);
    }

    #[test]
    fn groups_along_the_outputs_have_scales_per_column() {
        let mut parts = QuantizedParts { rows: 3, columns: 2, codes: vec![3, 1, 0, 2, 1, 3], ..parts() };
        (parts.group_size, parts.group_axis) = (GroupSize::Columns(2), GroupAxis::Output);
        parts.scales = vec![1.0, 2.0, 4.0, 8.0];
        parts.zero_points = Some(vec![0, 1, 2, 3]);
        let matrix = QuantizedMatrix::new(parts).unwrap();
        assert_eq!((matrix.groups(), matrix.scales().len()), (2, 4));
        assert_eq!(matrix.to_f32(), [3.0, 0.0, 0.0, 2.0, -4.0, 0.0]);
    }

    #[test]
    fn leading_rows_and_columns_keep_their_groups() {
        let matrix = QuantizedMatrix::new(parts()).unwrap();
        let values = matrix.to_f32();
        assert_eq!(matrix.leading_rows(1).to_f32(), values[..5]);
        assert_eq!(matrix.leading_rows(9).to_f32(), values);
        for columns in 0..=5 {
            let expected: Vec<f32> = values.chunks(5).flat_map(|row| &row[..columns]).copied().collect();
            let leading = matrix.leading_columns(columns);
            assert_eq!(leading.to_f32(), expected);
            assert!(QuantizedMatrix::new(leading.into_parts()).is_ok());
        }
    }

    #[test]
    fn offsets_are_added_and_tables_looked_up() {
        let offsets = QuantizedParts { zero_points: None, offsets: Some(vec![1.0, -1.0, 0.25, 0.0]), ..parts() };
        let matrix = QuantizedMatrix::new(offsets).unwrap();
        assert_eq!(matrix.to_f32(), [1.0, 1.5, 2.0, 5.0, -1.0, 3.25, 2.25, 1.25, 0.0, 4.0]);
        assert!(!matrix.is_symmetric());
        assert_eq!(matrix.stored_bits(), 10 * 2 + 4 * 16 + 4 * 16);

        let table = QuantizedParts { bits: 4, zero_points: None, code_table: Some(CodeTable::FP4), ..parts() };
        let matrix =
            QuantizedMatrix::new(QuantizedParts { codes: vec![0, 1, 7, 15, 9, 0, 1, 2, 3, 4], ..table }).unwrap();
        assert_eq!(matrix.to_f32(), [0.0, 0.25, 3.0, -12.0, -1.0, 0.0, 0.5, 1.0, 6.0, 8.0]);
    }

    #[test]
    fn parts_that_do_not_fit_are_refused() {
        let spoil: [fn(&mut QuantizedParts); 11] = [
            |p| p.bits = 7,
            |p| p.codes[3] = 4,
            |p| p.codes.truncate(9),
            |p| p.scales.push(1.0),
            |p| p.zero_points = Some(vec![0; 3]),
            |p| p.group_index = Some(vec![2; 5]),
            |p| p.offsets = Some(vec![0.0; 4]),
            |p| (p.zero_points, p.offsets) = (None, Some(vec![0.0; 3])),
            |p| (p.zero_points, p.code_table) = (None, Some(CodeTable::NF4)),
            |p| p.group_axis = GroupAxis::Output,
            |p| {
                (p.group_axis, p.group_size) = (GroupAxis::Output, GroupSize::WholeRow);
                (p.scales, p.zero_points, p.group_index) = (vec![1.0; 5], None, Some(vec![0; 5]));
            },
        ];
        for spoil in spoil {
            let mut parts = parts();
            spoil(&mut parts);
            assert_eq!(QuantizedMatrix::new(parts).unwrap_err().code, ErrorCode::ShapeMismatch);
        }
    }
}
