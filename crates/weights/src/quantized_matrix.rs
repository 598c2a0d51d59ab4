use kintsugi_runtime::{Error, ErrorCode, Result};
use serde::{Deserialize, Serialize};

use crate::ElementType;

/// Code widths of the integer grids that solvers, files and kernels know.
pub const INTEGER_BITS: [u8; 4] = [2, 3, 4, 8];

/// How many consecutive columns of a row share a scale and a zero point.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum GroupSize {
    /// That many columns; the last group of a row may be shorter.
    Columns(usize),
    /// One group per row.
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

/// A matrix on integer grids: `w[r, c] = (code[r, c] − zero[r, g(c)]) · scale[r, g(c)]`.
///
/// Canonical: independent of the CPU and of the file format. `g(c)` is `c / groupSize`, or `group_index[c]` where
/// the solver assigned columns to groups in another order.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantizedMatrix {
    rows: usize,
    columns: usize,
    bits: u8,
    group_size: GroupSize,
    codes: Vec<u8>,
    scales: Vec<f32>,
    scale_type: ElementType,
    zero_points: Option<Vec<u8>>,
    group_index: Option<Vec<u32>>,
}

/// The parts of a [`QuantizedMatrix`], named.
#[derive(Clone, Debug)]
pub struct QuantizedParts {
    /// Rows (outputs).
    pub rows: usize,
    /// Columns (inputs).
    pub columns: usize,
    /// Width of a code.
    pub bits: u8,
    /// Columns per group.
    pub group_size: GroupSize,
    /// `[rows, columns]`, one code per byte.
    pub codes: Vec<u8>,
    /// `[rows, groups]`, already rounded to `scale_type`.
    pub scales: Vec<f32>,
    /// The type that scales are stored in.
    pub scale_type: ElementType,
    /// `[rows, groups]`; `None` on a symmetric grid, whose zero point is `2^(bits−1)`.
    pub zero_points: Option<Vec<u8>>,
    /// `[columns]`: the group of each column, where it is not `c / groupSize`.
    pub group_index: Option<Vec<u32>>,
}

impl QuantizedMatrix {
    /// Checks the parts against each other and takes them.
    ///
    /// # Errors
    /// `ERR_SHAPE_MISMATCH` when a length, a code, a zero point or a group index does not fit.
    pub fn new(parts: QuantizedParts) -> Result<Self> {
        let QuantizedParts { rows, columns, bits, group_size, codes, scales, scale_type, zero_points, group_index } =
            parts;
        let wrong = |message: String| Err(Error::new(ErrorCode::ShapeMismatch, message).subject("QuantizedMatrix"));
        if !INTEGER_BITS.contains(&bits) {
            return wrong(format!("codes have 2, 3, 4 or 8 bits, not {bits}"));
        }
        let groups = group_size.groups(columns);
        if codes.len() != rows * columns {
            return wrong(format!("a {rows}×{columns} matrix has {} codes", codes.len()));
        }
        if scales.len() != rows * groups {
            return wrong(format!("{rows} rows of {groups} groups have {} scales", scales.len()));
        }
        let limit = 1u16 << bits;
        if let Some(code) = codes.iter().find(|&&code| u16::from(code) >= limit) {
            return wrong(format!("code {code} does not fit into {bits} bits"));
        }
        if let Some(zero_points) = &zero_points {
            if zero_points.len() != rows * groups {
                return wrong(format!("{rows} rows of {groups} groups have {} zero points", zero_points.len()));
            }
            if let Some(zero) = zero_points.iter().find(|&&zero| u16::from(zero) >= limit) {
                return wrong(format!("zero point {zero} does not fit into {bits} bits"));
            }
        }
        if let Some(index) = &group_index
            && (index.len() != columns || index.iter().any(|&group| group as usize >= groups))
        {
            return wrong(format!("the group index does not map {columns} columns to {groups} groups"));
        }
        Ok(QuantizedMatrix { rows, columns, bits, group_size, codes, scales, scale_type, zero_points, group_index })
    }

    /// Number of rows (outputs).
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns (inputs).
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Width of a code in bits.
    pub fn bits(&self) -> u8 {
        self.bits
    }

    /// Columns per group.
    pub fn group_size(&self) -> GroupSize {
        self.group_size
    }

    /// Groups per row.
    pub fn groups(&self) -> usize {
        self.group_size.groups(self.columns)
    }

    /// One code per byte, `[rows, columns]`.
    pub fn codes(&self) -> &[u8] {
        &self.codes
    }

    /// `[rows, groups]`, exactly as stored.
    pub fn scales(&self) -> &[f32] {
        &self.scales
    }

    /// The type that scales are stored in.
    pub fn scale_type(&self) -> ElementType {
        self.scale_type
    }

    /// `[rows, groups]`, or `None` on a symmetric grid.
    pub fn zero_points(&self) -> Option<&[u8]> {
        self.zero_points.as_deref()
    }

    /// The group of each column where it is not `c / groupSize`.
    pub fn group_index(&self) -> Option<&[u32]> {
        self.group_index.as_deref()
    }

    /// The zero point of a group of a row.
    pub fn zero_point(&self, row: usize, group: usize) -> u8 {
        match &self.zero_points {
            Some(zero_points) => zero_points[row * self.groups() + group],
            None => 1 << (self.bits - 1),
        }
    }

    /// The group that column `column` belongs to.
    pub fn group_of(&self, column: usize) -> usize {
        match &self.group_index {
            Some(index) => index[column] as usize,
            None => column / self.group_size.columns(self.columns),
        }
    }

    /// Writes row `row` as f32 into `out` (`columns` long).
    pub fn row_to_f32(&self, row: usize, out: &mut [f32]) {
        let groups = self.groups();
        let codes = &self.codes[row * self.columns..(row + 1) * self.columns];
        for (column, (value, &code)) in out.iter_mut().zip(codes).enumerate() {
            let group = self.group_of(column);
            let zero = self.zero_point(row, group);
            *value = (f32::from(code) - f32::from(zero)) * self.scales[row * groups + group];
        }
    }

    /// All values as f32, row-major.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.rows * self.columns];
        for (row, values) in out.chunks_exact_mut(self.columns.max(1)).enumerate() {
            self.row_to_f32(row, values);
        }
        out
    }

    /// Bits that this matrix takes when stored: codes, scales, zero points and group index.
    pub fn stored_bits(&self) -> u64 {
        let bits = u64::from(self.bits);
        let groups = (self.rows * self.groups()) as u64;
        let zero_points = if self.zero_points.is_some() { groups * bits } else { 0 };
        let index = if self.group_index.is_some() { self.columns as u64 * 32 } else { 0 };
        (self.rows * self.columns) as u64 * bits + groups * self.scale_type.bits() as u64 + zero_points + index
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
            group_index: None,
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
    fn parts_that_do_not_fit_are_refused() {
        let spoil: [fn(&mut QuantizedParts); 6] = [
            |p| p.bits = 5,
            |p| p.codes[3] = 4,
            |p| p.codes.truncate(9),
            |p| p.scales.push(1.0),
            |p| p.zero_points = Some(vec![0; 3]),
            |p| p.group_index = Some(vec![2; 5]),
        ];
        for spoil in spoil {
            let mut parts = parts();
            spoil(&mut parts);
            assert_eq!(QuantizedMatrix::new(parts).unwrap_err().code, ErrorCode::ShapeMismatch);
        }
    }
}
