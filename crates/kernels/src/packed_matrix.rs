use std::ops::Range;
use std::sync::Arc;

use kintsugi_weights::{CodeTable, ElementType};

use crate::Precision;
use crate::aligned_bytes::AlignedBytes;
use crate::code_fields::CodeFields;
use crate::grid_parameters::GridParameters;
use crate::vector::LANES;

/// A [`LinearWeight`](kintsugi_weights::LinearWeight) in the layout that products read.
///
/// Rows are packed in panels of 32, each contiguous: for each block of columns the codes, then 32 scales in their
/// stored type, then 32 zero points or offsets; after the last block the rows of B of the low-rank compensation, in the
/// same way. So a product streams one sequence of bytes per panel, compensation included. A of the compensation is a
/// `PackedMatrix` of its own.
#[derive(Clone)]
pub struct PackedMatrix {
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) precision: Precision,
    pub(crate) main: Section,
    pub(crate) compensation: Option<Compensation>,
    pub(crate) bias: Option<Vec<f32>>,
    pub(crate) panel_bytes: usize,
    pub(crate) panels: AlignedBytes,
}

/// The low-rank part `B (A x)` of a packed matrix.
pub(crate) struct Compensation {
    /// A, `[rank, in]`.
    pub(crate) a: Arc<PackedMatrix>,
    /// Whether A belongs to another matrix.
    pub(crate) borrowed: bool,
    /// Where the rows of B are in each panel.
    pub(crate) b: Section,
}

/// A copy has an A of its own.
impl Clone for Compensation {
    fn clone(&self) -> Self {
        Compensation { a: Arc::new(PackedMatrix::clone(&self.a)), borrowed: false, b: self.b.clone() }
    }
}

/// A part of every panel: a matrix in one encoding.
#[derive(Clone, PartialEq)]
pub(crate) struct Section {
    pub(crate) encoding: PanelEncoding,
    pub(crate) layout: ColumnLayout,
    /// Scales and zero points after the codes of each block; `None` for plain floats.
    pub(crate) grid: Option<GridParameters>,
    /// What codes stand for, where they are not integers.
    pub(crate) table: CodeTable,
    /// Where products are computed in int8: codes then lie as [`integer_encoding`](crate::integer_encoding) reads them.
    pub(crate) integers: Option<IntegerCodes>,
    /// Bytes from the start of a panel.
    pub(crate) offset: usize,
}

/// How codes are integers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct IntegerCodes {
    /// What stands for a code, in units, where codes do not stand for themselves.
    pub(crate) table: [i8; 16],
    /// A power of two.
    pub(crate) unit: f32,
}

/// Which columns of x a matrix reads in which order, and in which blocks.
///
/// A block is a run of columns with one scale per row, padded with columns of value zero to whole steps.
#[derive(Clone, Default, PartialEq)]
pub(crate) struct ColumnLayout {
    /// The column of x at each place; `None` when that is the place itself.
    pub(crate) order: Option<Vec<u32>>,
    pub(crate) blocks: Vec<ColumnBlock>,
    /// Steps of each block, once more for the kernels.
    pub(crate) steps: Vec<u32>,
    /// Columns of a step.
    pub(crate) step_columns: usize,
}

/// A run of columns that share a scale.
#[derive(Clone, Copy, PartialEq)]
pub(crate) struct ColumnBlock {
    /// The first place in the order of columns.
    pub(crate) start: usize,
    /// Number of columns.
    pub(crate) columns: usize,
    /// The group that the scale comes from.
    pub(crate) group: usize,
}

/// How columns are encoded in a panel; the types in [`codec`](crate::codec) are the same, for the compiler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PanelEncoding {
    Bits2,
    Bits3,
    Bits4,
    Bits5,
    Bits6,
    Bits8,
    Table4,
    F32,
    F16,
    Bf16,
}

/// The type that the activations of a product are rounded to; sums are f32 in the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Arithmetic {
    /// Activations are not rounded.
    F32,
    /// Products of bf16 are added up in f32.
    Bf16,
    /// Products of int8 are added up in i32 for each block of up to 128 columns.
    Int8,
}

impl Arithmetic {
    /// `f32`, `bf16` or `int8`.
    pub const fn name(self) -> &'static str {
        match self {
            Arithmetic::F32 => "f32",
            Arithmetic::Bf16 => "bf16",
            Arithmetic::Int8 => "int8",
        }
    }

    /// Columns of x in a 32-bit word.
    pub(crate) const fn columns_per_word(self) -> usize {
        match self {
            Arithmetic::F32 => 1,
            Arithmetic::Bf16 => 2,
            Arithmetic::Int8 => 4,
        }
    }
}

impl PackedMatrix {
    /// Number of outputs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of inputs.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// How products with this matrix are computed.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Keeps A of the compensation once with that of another matrix, where both are the same:
    /// [`Kernels::products`](crate::Kernels::products) then multiplies with it once.
    pub fn share_projection(&mut self, other: &PackedMatrix) {
        if let (Some(own), Some(others)) = (&mut self.compensation, &other.compensation)
            && (Arc::ptr_eq(&own.a, &others.a) || own.a.is_same(&others.a))
        {
            own.a = Arc::clone(&others.a);
            own.borrowed = true;
        }
    }

    /// Whether both are the same plain matrix.
    fn is_same(&self, other: &PackedMatrix) -> bool {
        let shape = |matrix: &PackedMatrix| (matrix.rows, matrix.columns, matrix.precision);
        let plain = |matrix: &PackedMatrix| matrix.compensation.is_none() && matrix.bias.is_none();
        shape(self) == shape(other)
            && plain(self)
            && plain(other)
            && self.main == other.main
            && self.panels.as_slice() == other.panels.as_slice()
    }

    /// Bytes that this matrix takes in memory, compensation and bias included; without an A that belongs to another matrix,
    /// which counts it as long as there is that matrix.
    pub fn memory_bytes(&self) -> usize {
        let compensation = self.compensation.as_ref().map_or(0, |part| {
            let a = if part.borrowed { 0 } else { part.a.memory_bytes() + size_of::<PackedMatrix>() };
            a + part.b.layout.memory_bytes()
        });
        let bias = self.bias.as_ref().map_or(0, |bias| size_of_val(bias.as_slice()));
        self.panels.len() + self.main.layout.memory_bytes() + compensation + bias
    }

    /// Number of panels.
    pub(crate) fn panel_count(&self) -> usize {
        self.rows.div_ceil(LANES)
    }
}

impl std::fmt::Debug for PackedMatrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PackedMatrix")
            .field("rows", &self.rows)
            .field("columns", &self.columns)
            .field("precision", &self.precision)
            .field("encoding", &self.main.encoding)
            .field("rank", &self.compensation.as_ref().map_or(0, |part| part.a.rows))
            .field("bytes", &self.memory_bytes())
            .finish()
    }
}

impl Section {
    /// Whether rows of x are packed alike for both.
    pub(crate) fn reads_like(&self, other: &Section) -> bool {
        let needs_block_sums = |section: &Section| section.grid.is_some_and(GridParameters::needs_block_sums);
        let unit = |section: &Section| section.integers.map(|integers| integers.unit);
        unit(self) == unit(other)
            && (unit(self).is_some() || needs_block_sums(self) == needs_block_sums(other))
            && self.layout.reads_like(&other.layout)
    }

    /// Bytes of this section in each panel.
    pub(crate) fn bytes(&self) -> usize {
        let steps: usize = self.layout.steps.iter().map(|&steps| steps as usize).sum();
        steps * self.encoding.step_bytes() + self.layout.steps.len() * self.grid.map_or(0, GridParameters::bytes)
    }
}

impl ColumnLayout {
    /// Longest block: a float sum over more columns than this is split, which bounds its rounding error, and a
    /// longer group of a grid repeats its scale, and zero points or offsets, for each block. That is 16 to 64 bits per
    /// row: 1.6 to 6.3 % of the codes of a whole block at 2 bits, a quarter of that at 8.
    pub(crate) const BLOCK_COLUMNS: usize = 512;

    /// Longest block of products in int8: activations have a scale of their own for each block. A longer group repeats
    /// its scale, and zero points or offsets, for each: four times the share of `BLOCK_COLUMNS`.
    pub(crate) const INTEGER_BLOCK_COLUMNS: usize = 128;

    /// The columns in their own order.
    pub(crate) fn plain(columns: usize, step_columns: usize) -> Self {
        let mut layout = ColumnLayout { step_columns, ..Self::default() };
        layout.push_group(0, columns, 0, Self::BLOCK_COLUMNS);
        layout
    }

    /// The columns group by group, in blocks of up to `block_columns`, where `group_of` tells the group of each of them.
    pub(crate) fn grouped(
        columns: usize,
        groups: usize,
        step_columns: usize,
        block_columns: usize,
        group_of: impl Fn(usize) -> usize,
        reordered: bool,
    ) -> Self {
        let mut layout = ColumnLayout { step_columns, ..Self::default() };
        let mut sizes = vec![0; groups];
        (0..columns).for_each(|column| sizes[group_of(column)] += 1);
        let mut start = 0;
        for (group, &size) in sizes.iter().enumerate() {
            layout.push_group(start, size, group, block_columns);
            start += size;
        }
        if reordered {
            let mut order: Vec<u32> = (0..columns as u32).collect();
            order.sort_by_key(|&column| group_of(column as usize));
            layout.order = Some(order);
        }
        layout
    }

    /// The same blocks in steps of another length.
    pub(crate) fn in_steps_of(mut self, step_columns: usize) -> Self {
        self.step_columns = step_columns;
        self.steps = self.blocks.iter().map(|block| block.columns.div_ceil(step_columns) as u32).collect();
        self
    }

    /// How many steps of so many columns the blocks take.
    pub(crate) fn steps_of(&self, step_columns: usize) -> usize {
        self.blocks.iter().map(|block| block.columns.div_ceil(step_columns)).sum()
    }

    /// Whether both read the same columns in the same order, in the same blocks with the same padding.
    fn reads_like(&self, other: &Self) -> bool {
        let padded = |layout: &Self, block: usize| layout.steps[block] as usize * layout.step_columns;
        self.blocks.len() == other.blocks.len()
            && (0..self.blocks.len()).all(|block| {
                let (own, others) = (&self.blocks[block], &other.blocks[block]);
                (own.start, own.columns, padded(self, block)) == (others.start, others.columns, padded(other, block))
            })
            && self.order == other.order
    }

    fn push_group(&mut self, start: usize, columns: usize, group: usize, block_columns: usize) {
        for first in (0..columns).step_by(block_columns) {
            let columns = (columns - first).min(block_columns);
            self.blocks.push(ColumnBlock { start: start + first, columns, group });
            self.steps.push(columns.div_ceil(self.step_columns) as u32);
        }
    }

    /// Runs of blocks of up to [`BLOCK_COLUMNS`](Self::BLOCK_COLUMNS) columns together. They follow from the layout
    /// alone: sums that are kept apart for each run come out the same whoever computes them.
    pub(crate) fn runs(&self) -> Vec<Range<usize>> {
        let mut runs: Vec<Range<usize>> = Vec::new();
        let mut columns = 0;
        for (index, block) in self.blocks.iter().enumerate() {
            columns += block.columns;
            match runs.last_mut() {
                Some(run) if columns <= Self::BLOCK_COLUMNS => run.end = index + 1,
                _ => {
                    runs.push(index..index + 1);
                    columns = block.columns;
                }
            }
        }
        runs
    }

    /// Columns with the padding of each block.
    pub(crate) fn padded_columns(&self) -> usize {
        self.steps.iter().map(|&steps| steps as usize * self.step_columns).sum()
    }

    /// The column of x at a place.
    pub(crate) fn column(&self, place: usize) -> usize {
        match &self.order {
            Some(order) => order[place] as usize,
            None => place,
        }
    }

    fn memory_bytes(&self) -> usize {
        self.order.as_ref().map_or(0, |order| size_of_val(order.as_slice()))
            + size_of_val(self.blocks.as_slice())
            + size_of_val(self.steps.as_slice())
    }
}

impl IntegerCodes {
    /// The codes of a grid themselves, or the values of a table where they are multiples of a power of two up to ±127.
    pub(crate) fn of(table: Option<&CodeTable>) -> Option<Self> {
        let Some(table) = table else { return Some(IntegerCodes { table: [0; 16], unit: 1.0 }) };
        [1.0, 0.5, 0.25, 0.125].into_iter().find_map(|unit| {
            let integers = table.values().map(|value| value / unit);
            let fit = integers.iter().all(|value| value.fract() == 0.0 && value.abs() <= 127.0);
            fit.then(|| IntegerCodes { table: integers.map(|value| value as i8), unit })
        })
    }
}

impl PanelEncoding {
    /// The encodings of integer codes, narrowest first.
    const INTEGERS: [Self; 6] = [Self::Bits2, Self::Bits3, Self::Bits4, Self::Bits5, Self::Bits6, Self::Bits8];

    /// The encodings that hold integer codes of that many bits, narrowest first.
    pub(crate) fn of_bits(bits: u8) -> impl Iterator<Item = Self> {
        Self::INTEGERS.into_iter().filter(move |encoding| encoding.code_bits() >= Some(u32::from(bits)))
    }

    /// The encoding of plain floats.
    pub(crate) fn of_element(element: ElementType) -> Self {
        match element {
            ElementType::F32 => PanelEncoding::F32,
            ElementType::F16 => PanelEncoding::F16,
            ElementType::Bf16 => PanelEncoding::Bf16,
        }
    }

    /// Columns of a step.
    pub(crate) fn step_columns(self) -> usize {
        self.code_bits().map_or(4, |bits| CodeFields::of_halves(bits).columns())
    }

    /// Bits of a column of a row; `None` for floats.
    pub(crate) fn code_bits(self) -> Option<u32> {
        match self {
            PanelEncoding::Bits2 => Some(2),
            PanelEncoding::Bits3 => Some(3),
            PanelEncoding::Bits4 | PanelEncoding::Table4 => Some(4),
            PanelEncoding::Bits5 => Some(5),
            PanelEncoding::Bits6 => Some(6),
            PanelEncoding::Bits8 => Some(8),
            PanelEncoding::F32 | PanelEncoding::F16 | PanelEncoding::Bf16 => None,
        }
    }

    /// 32-bit words of a step of a row.
    pub(crate) fn step_words(self) -> usize {
        match (self, self.code_bits()) {
            (_, Some(bits)) => CodeFields::of_halves(bits).words(),
            (PanelEncoding::F16 | PanelEncoding::Bf16, None) => 2,
            (_, None) => 4,
        }
    }

    /// Bytes of a step of a panel.
    pub(crate) fn step_bytes(self) -> usize {
        self.step_words() * 4 * LANES
    }

    /// Whether the encoded values are exact in bf16; those of a table may not be.
    pub(crate) fn fits_bf16(self) -> bool {
        !matches!(self, PanelEncoding::F32 | PanelEncoding::F16 | PanelEncoding::Table4)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::Encoding;
    use crate::kernel_table::of_encoding;
    use crate::scalar::Scalar;

    fn check<E: Encoding<Scalar>>(encoding: PanelEncoding) {
        assert_eq!((encoding.step_columns(), encoding.step_bytes()), (E::COLUMNS, E::BYTES), "{encoding:?}");
    }

    #[test]
    fn the_packer_and_the_kernels_agree_about_steps() {
        for encoding in [PanelEncoding::F32, PanelEncoding::F16, PanelEncoding::Bf16, PanelEncoding::Table4] {
            of_encoding!(encoding, E => check::<E>(encoding));
        }
        for encoding in PanelEncoding::INTEGERS {
            of_encoding!(encoding, E => check::<E>(encoding));
        }
    }

    #[test]
    fn groups_become_runs_of_columns_in_their_order() {
        let group_of = |column: usize| [1, 0, 1, 0, 0, 3][column];
        let layout = ColumnLayout::grouped(6, 4, 4, 512, group_of, true);
        assert_eq!(layout.order.as_deref(), Some(&[1, 3, 4, 0, 2, 5][..]));
        let blocks: Vec<_> = layout.blocks.iter().map(|block| (block.start, block.columns, block.group)).collect();
        assert_eq!(blocks, [(0, 3, 0), (3, 2, 1), (5, 1, 3)]);
        assert_eq!(layout.padded_columns(), 12);
    }

    #[test]
    fn tables_of_integers_are_found() {
        let fp4 = IntegerCodes::of(Some(&CodeTable::FP4)).unwrap();
        assert_eq!((fp4.table[..8].to_vec(), fp4.unit), (vec![0, 1, 2, 3, 4, 6, 8, 12], 0.5));
        let iq4_nl = IntegerCodes::of(Some(&CodeTable::IQ4_NL)).unwrap();
        assert_eq!((iq4_nl.table[0], iq4_nl.unit), (-127, 1.0));
        assert_eq!(IntegerCodes::of(Some(&CodeTable::NF4)), None);
    }

    #[test]
    fn long_groups_are_split() {
        let layout = ColumnLayout::plain(1030, 8);
        let blocks: Vec<_> = layout.blocks.iter().map(|block| (block.start, block.columns)).collect();
        assert_eq!(blocks, [(0, 512), (512, 512), (1024, 6)]);
        assert_eq!(layout.steps, [64, 64, 1]);
        assert_eq!(layout.runs(), [0..1, 1..2, 2..3]);
    }

    #[test]
    fn short_groups_share_runs() {
        let layout = ColumnLayout::grouped(1030, 6, 8, 512, |column| column / 200, false);
        assert_eq!(layout.runs(), [0..2, 2..4, 4..6]);
        assert!(ColumnLayout::default().runs().is_empty());
    }
}
