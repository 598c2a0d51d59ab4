use std::ops::Range;

use kintsugi_linalg::{MatrixView, MatrixViewMut, UpperTriangle, add_product};
use kintsugi_runtime::ThreadPool;
use kintsugi_weights::DenseMatrix;

use crate::{Grid, GridRule, GroupInputs};

/// Rows that one task sweeps: enough to repay the packing of the factor, few enough to keep their weights in a cache.
const ROWS: usize = 128;
/// Rows that are rounded side by side.
const LANES: usize = 16;
/// Adding 1.5 · 2²³ to a small f32 rounds it to the nearest integer, half-way cases to even, and leaves that integer
/// in the low bits.
const ROUND: f32 = 12_582_912.0;

type Lanes = [f32; LANES];

/// What all rows share. A position is a place in the order of the sweep, `order[position]` the column there.
pub(crate) struct Sweep<'a> {
    pub(crate) weight: &'a DenseMatrix,
    pub(crate) rule: GridRule,
    pub(crate) groups: SweepGroups,
    /// S, by column.
    pub(crate) moment: &'a UpperTriangle<f64>,
    /// `S_jj` per column; 0 where no token ever activated it.
    pub(crate) energies: Vec<f64>,
    /// Most positions that are rounded before a product.
    pub(crate) block: usize,
    pub(crate) order: Vec<usize>,
    /// `R_ij / R_jj` by position.
    pub(crate) unit: UpperTriangle<f32>,
    /// `R_jj` by position.
    pub(crate) diagonal: Vec<f64>,
}

/// The weights that share a grid.
#[derive(Clone, Copy)]
pub(crate) enum SweepGroups {
    /// `count` groups per row, of `size` columns: runs of neighbours with grids from the original weights where they are
    /// `fixed`, else runs of positions with grids from the weights that the sweep finds there.
    Input { fixed: bool, size: usize, count: usize },
    /// Runs of `size` rows of one column, with grids from the weights that the sweep finds there.
    Output { size: usize },
}

/// What a sweep over some rows found.
pub(crate) struct Swept {
    /// `[rows, columns]`
    pub(crate) codes: Vec<u8>,
    /// `[rows, groups]`, or along the outputs `[groups, columns]`
    pub(crate) grids: Vec<Grid>,
    /// `Σ e²`
    pub(crate) energy: f64,
}

/// The rows of one task, by position and then by row, so that [`LANES`] rows go through the same instructions. Rows
/// that fill the last lanes are zero.
struct Tile {
    rows: usize,
    strips: usize,
    /// `[columns, strips]`
    weights: Vec<Lanes>,
    /// Of positions that are still to come, what the errors so far add to the weight; of the others `w − ŵ`.
    /// `[columns, strips]`
    moves: Vec<Lanes>,
    /// `[columns, strips]`
    codes: Vec<[u8; LANES]>,
    /// `[groups, strips]`; empty where groups lie along the outputs, as are `zeros`.
    scales: Vec<Lanes>,
    /// `[groups, strips]`
    zeros: Vec<Lanes>,
    /// As in [`Swept`].
    grids: Vec<Grid>,
    energy: f64,
}

impl Sweep<'_> {
    /// Rounds every row.
    pub(crate) fn run(&self, pool: &ThreadPool) -> Swept {
        let (rows, columns) = (self.weight.rows(), self.order.len());
        let height = self.groups.tile_rows();
        let mut codes = vec![0; rows * columns];
        let mut parts: Vec<(&mut [u8], Vec<Grid>, f64)> =
            codes.chunks_mut(height * columns).map(|codes| (codes, Vec::new(), 0.0)).collect();
        pool.for_each_chunk(&mut parts, 1, |index, part| {
            let (codes, grids, energy) = &mut part[0];
            let first = index * height;
            let mut tile = self.load(first..rows.min(first + height));
            self.sweep(&mut tile, 0..columns);
            self.unload(&tile, codes);
            (*grids, *energy) = (tile.grids, tile.energy);
        });
        let energy = parts.iter().map(|(_, _, energy)| energy).sum();
        let grids = parts.into_iter().flat_map(|(_, grids, _)| grids).collect();
        Swept { codes, grids, energy }
    }

    /// The group of each column, where it is not the column's own position that tells it.
    pub(crate) fn group_index(&self) -> Option<Vec<u32>> {
        let SweepGroups::Input { fixed: false, size, .. } = self.groups else { return None };
        let mut index = vec![0; self.order.len()];
        for (position, &column) in self.order.iter().enumerate() {
            index[column] = (position / size) as u32;
        }
        let usual = index.iter().enumerate().all(|(column, &group)| column / size == group as usize);
        (!usual).then_some(index)
    }

    fn load(&self, rows: Range<usize>) -> Tile {
        let (columns, strips) = (self.order.len(), rows.len().div_ceil(LANES));
        let (groups, grids) = match self.groups {
            SweepGroups::Input { count, .. } => (count, rows.len() * count),
            SweepGroups::Output { size } => (0, rows.len().div_ceil(size) * columns),
        };
        let mut tile = Tile {
            rows: rows.len(),
            strips,
            weights: vec![[0.0; LANES]; columns * strips],
            moves: vec![[0.0; LANES]; columns * strips],
            codes: vec![[0; LANES]; columns * strips],
            scales: vec![[1.0; LANES]; groups * strips],
            zeros: vec![[0.0; LANES]; groups * strips],
            grids: vec![self.rule.fit(&[], None); grids],
            energy: 0.0,
        };
        let mut values = vec![0.0f32; LANES * columns];
        for strip in 0..strips {
            let first = strip * LANES;
            values.fill(0.0);
            for (row, values) in (first..rows.len().min(first + LANES)).zip(values.chunks_exact_mut(columns)) {
                self.weight.row_to_f32(rows.start + row, values);
                for (value, &energy) in values.iter_mut().zip(&self.energies) {
                    *value = if energy == 0.0 { 0.0 } else { *value };
                }
                if let SweepGroups::Input { fixed: true, size, count } = self.groups {
                    let groups = values.chunks(size).zip(self.energies.chunks(size));
                    for (group, (values, energies)) in groups.enumerate() {
                        let inputs = GroupInputs { energies, moment: Some((self.moment, group * size)), factors: None };
                        tile.set_grid(count, row, group, self.rule.fit(values, Some(inputs)));
                    }
                }
            }
            for (position, &column) in self.order.iter().enumerate() {
                let weights = &mut tile.weights[position * strips + strip];
                for (lane, weight) in weights.iter_mut().enumerate() {
                    *weight = values[lane * columns + column];
                }
            }
        }
        tile
    }

    /// Rounds the positions of `range`, whose moves hold the errors of everything before it. The positions are halved
    /// again and again, so that most of the work is in large products; a group that is fitted during the sweep is
    /// never cut apart by a range that is larger than the group.
    fn sweep(&self, tile: &mut Tile, range: Range<usize>) {
        let mut unit = self.block;
        if let SweepGroups::Input { fixed: false, size, count } = self.groups {
            let group_end = self.order.len().min(range.start + size);
            if range.start.is_multiple_of(size) && range.end == group_end {
                self.fit_group(tile, count, range.start / size, range.clone());
            }
            if range.len() > size {
                unit = size;
            }
        }
        if range.len() <= unit {
            match self.groups {
                SweepGroups::Input { fixed: true, size, .. } => {
                    self.round(tile, range, |position| self.order[position] / size);
                }
                SweepGroups::Input { fixed: false, size, .. } => self.round(tile, range, |position| position / size),
                SweepGroups::Output { size } => self.round_columns(tile, range, size),
            }
            return;
        }
        let middle = range.start + (range.len() / 2).next_multiple_of(unit);
        self.sweep(tile, range.start..middle);
        let height = tile.strips * LANES;
        let (before, behind) = tile.moves.split_at_mut(middle * tile.strips);
        let behind = behind[..(range.end - middle) * tile.strips].as_flattened_mut();
        for (first, factor) in self.unit.rectangle(range.start..middle, middle..range.end) {
            let before = before[first * tile.strips..][..factor.rows() * tile.strips].as_flattened();
            add_product(
                MatrixViewMut::new(behind, range.end - middle, height),
                factor.transposed(),
                MatrixView::new(before, factor.rows(), height),
            );
        }
        self.sweep(tile, middle..range.end);
    }

    /// Chooses the grids of the group at `range` from the weights that the published recursion has there. They make up
    /// for the errors before the group as well as the group alone can, so with the moves m they are `w + x`, where x
    /// solves `x_j + Σ_{i<j in the group} x_i R_ij / R_jj = m_j`.
    fn fit_group(&self, tile: &mut Tile, groups: usize, group: usize, range: Range<usize>) {
        let (strips, count) = (tile.strips, range.len());
        let mut solved = vec![[0.0f32; LANES]; count];
        let mut values = vec![0.0f32; count];
        let energies: Vec<f64> = self.order[range.clone()].iter().map(|&column| self.energies[column]).collect();
        let inputs = GroupInputs { energies: &energies, moment: None, factors: None };
        for strip in 0..strips {
            for j in 0..count {
                let mut sum = tile.moves[(range.start + j) * strips + strip];
                for (i, x) in solved[..j].iter().enumerate() {
                    let factor = self.unit.at(range.start + i, range.start + j);
                    for (sum, x) in sum.iter_mut().zip(x) {
                        *sum -= factor * x;
                    }
                }
                solved[j] = sum;
            }
            for row in strip * LANES..tile.rows.min((strip + 1) * LANES) {
                for (j, value) in values.iter_mut().enumerate() {
                    let weight = tile.weights[(range.start + j) * strips + strip][row % LANES];
                    *value = weight + solved[j][row % LANES];
                }
                tile.set_grid(groups, row, group, self.rule.fit(&values, Some(inputs)));
            }
        }
    }

    /// Rounds the positions of `range` one after the other, each on the grids of its group.
    fn round(&self, tile: &mut Tile, range: Range<usize>, group_of: impl Fn(usize) -> usize) {
        let (strips, count) = (tile.strips, range.len());
        // Column by column, because each position reads its column down to itself.
        let factor: Vec<f32> =
            (range.clone()).flat_map(|j| range.clone().map(move |i| (i, j))).map(|(i, j)| self.unit.at(i, j)).collect();
        let largest = f32::from(self.rule.largest_code());
        let mut moves = vec![[0.0f32; LANES]; count];
        for strip in 0..strips {
            let mut energy = [0.0f32; LANES];
            for (j, factor) in factor.chunks_exact(count).enumerate() {
                let position = range.start + j;
                let at = position * strips + strip;
                let group = group_of(position) * strips + strip;
                let mut sum = tile.moves[at];
                for (&factor, before) in factor.iter().zip(&moves[..j]) {
                    for (sum, before) in sum.iter_mut().zip(before) {
                        *sum += factor * before;
                    }
                }
                let diagonal = self.diagonal[position] as f32;
                let (weights, scales, zeros) = (&tile.weights[at], &tile.scales[group], &tile.zeros[group]);
                let (codes, moves) = (&mut tile.codes[at], &mut moves[j]);
                for lane in 0..LANES {
                    let (scale, zero) = (scales[lane], zeros[lane]);
                    let target = weights[lane] + sum[lane];
                    let rounded = (target / scale).clamp(-zero, largest - zero) + ROUND;
                    codes[lane] = (rounded.to_bits() as u8).wrapping_add(zero as u8);
                    let value = (rounded - ROUND) * scale;
                    moves[lane] = weights[lane] - value;
                    let error = (target - value) * diagonal;
                    energy[lane] += error * error;
                }
            }
            for (j, moves) in moves.iter().enumerate() {
                tile.moves[(range.start + j) * strips + strip] = *moves;
            }
            tile.energy += energy.iter().map(|&energy| f64::from(energy)).sum::<f64>();
        }
    }

    /// Rounds the positions of `range` one after the other; the rows of a group get their grid when their position is
    /// reached.
    fn round_columns(&self, tile: &mut Tile, range: Range<usize>, size: usize) {
        let (rows, strips, columns) = (tile.rows, tile.strips, self.order.len());
        let mut targets = vec![[0.0f32; LANES]; strips];
        let mut energies = vec![0.0; size.min(rows)];
        for position in range.clone() {
            let (before, own) = tile.moves.split_at_mut(position * strips);
            for (strip, (target, moves)) in targets.iter_mut().zip(own.iter()).enumerate() {
                let mut sum = *moves;
                for earlier in range.start..position {
                    let factor = self.unit.at(earlier, position);
                    for (sum, before) in sum.iter_mut().zip(&before[earlier * strips + strip]) {
                        *sum += factor * before;
                    }
                }
                for ((target, sum), weight) in target.iter_mut().zip(sum).zip(tile.weights[position * strips + strip]) {
                    *target = weight + sum;
                }
            }
            let column = self.order[position];
            energies.fill(self.energies[column]);
            let weights = tile.weights[position * strips..(position + 1) * strips].as_flattened();
            let moves = own[..strips].as_flattened_mut();
            let codes = tile.codes[position * strips..(position + 1) * strips].as_flattened_mut();
            let mut energy = 0.0;
            for (group, targets) in targets.as_flattened()[..rows].chunks(size).enumerate() {
                let inputs = GroupInputs { energies: &energies[..targets.len()], moment: None, factors: None };
                let grid = self.rule.fit(targets, Some(inputs));
                tile.grids[group * columns + column] = grid;
                for (row, &target) in (group * size..).zip(targets) {
                    codes[row] = grid.code(target);
                    let value = grid.value(codes[row]);
                    moves[row] = weights[row] - value;
                    let error = f64::from(target - value) * self.diagonal[position];
                    energy += error * error;
                }
            }
            tile.energy += energy;
        }
    }

    /// Writes the codes of a tile by row and column.
    fn unload(&self, tile: &Tile, codes: &mut [u8]) {
        let columns = self.order.len();
        for (strip, codes) in codes.chunks_mut(LANES * columns).enumerate() {
            for (position, &column) in self.order.iter().enumerate() {
                let lanes = &tile.codes[position * tile.strips + strip];
                for (row, &code) in codes.chunks_exact_mut(columns).zip(lanes) {
                    row[column] = code;
                }
            }
        }
    }
}

impl SweepGroups {
    /// Rows of a tile, which cuts no group apart.
    pub(crate) fn tile_rows(self) -> usize {
        match self {
            SweepGroups::Input { .. } => ROWS,
            SweepGroups::Output { size } => ROWS.next_multiple_of(size),
        }
    }
}

impl Tile {
    fn set_grid(&mut self, groups: usize, row: usize, group: usize, grid: Grid) {
        let at = group * self.strips + row / LANES;
        self.scales[at][row % LANES] = grid.scale;
        self.zeros[at][row % LANES] = f32::from(grid.zero);
        self.grids[row * groups + group] = grid;
    }
}
