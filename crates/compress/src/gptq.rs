use std::ops::Range;

use kintsugi_calibration::Calibration;
use kintsugi_linalg::{InverseCholesky, MatrixView, MatrixViewMut, subtract_product};
use kintsugi_runtime::{Error, ErrorCode, Result, ThreadPool};
use kintsugi_weights::{DenseMatrix, QuantizedMatrix};

use crate::linear_method::{assemble, check_input};
use crate::{Grid, GridRule, LinearMethod, QuantizeOptions};

/// Columns whose corrections are applied to the columns behind them in one product.
const BLOCK: usize = 128;
/// Rows that one task sweeps.
const ROWS: usize = 32;

/// GPTQ: rounds column by column and lets the columns that follow make up for the error.
#[derive(Clone, Copy, Debug)]
pub struct Gptq;

impl LinearMethod for Gptq {
    fn name(&self) -> &'static str {
        "gptq"
    }

    fn needs_calibration(&self) -> bool {
        true
    }

    fn compress(
        &self,
        weight: &DenseMatrix,
        calibration: Option<&Calibration>,
        options: &QuantizeOptions,
        pool: &ThreadPool,
    ) -> Result<QuantizedMatrix> {
        let calibration = calibration.ok_or_else(|| {
            Error::new(ErrorCode::OptionInvalid, "gptq needs calibration activations")
                .subject("calibration")
                .hint("Give a calibration text, or use the method rtn")
        })?;
        Ok(gptq(weight, calibration, options, pool)?.matrix)
    }
}

/// What [`gptq`] found.
#[derive(Clone, Debug)]
pub struct GptqSolution {
    /// The quantized weight.
    pub matrix: QuantizedMatrix,
    /// The objective that the sweep ends at, `tr(D H Dᵀ)` with `D = W − Ŵ` and the damped second moment `H`. Columns
    /// of dead channels count as zero in W.
    pub energy: f64,
    /// What was added to the diagonal of the second moment, absolute. More than asked for when H did not factor.
    pub damping: f64,
}

/// GPTQ (arXiv 2210.17323) by its Cholesky route, in f64.
///
/// With `H = S + damping · mean(diag S) · I` and `H⁻¹ = Uᵀ U`, U upper triangular, column j is rounded to its grid and
/// its error `e = (w_j − ŵ_j) / U_jj` is subtracted from the columns behind it as `e · U_j`. The constant that papers
/// put before S changes nothing, because the damping is relative.
///
/// As in the published algorithm, the weights of dead channels (`S_jj = 0`) become zero. A grid that is chosen during
/// the sweep sees weights that carry every correction of the columns before its group.
///
/// # Errors
/// Those of [`LinearMethod::compress`].
pub fn gptq(
    weight: &DenseMatrix,
    calibration: &Calibration,
    options: &QuantizeOptions,
    pool: &ThreadPool,
) -> Result<GptqSolution> {
    solve(weight, calibration, options, BLOCK, pool)
}

fn solve(
    weight: &DenseMatrix,
    calibration: &Calibration,
    options: &QuantizeOptions,
    block: usize,
    pool: &ThreadPool,
) -> Result<GptqSolution> {
    check_input(weight, Some(calibration), options)?;
    let (rows, columns) = (weight.rows(), weight.columns());
    let energies: Vec<f64> = (0..columns).map(|j| calibration.second_moment()[j * (columns + 1)]).collect();
    let mut order: Vec<usize> = (0..columns).collect();
    if options.act_order {
        order.sort_by(|&i, &j| energies[j].total_cmp(&energies[i]));
    }
    let live = energies.iter().filter(|&&energy| energy > 0.0).count();
    let mean = if live > 0 { energies.iter().sum::<f64>() / live as f64 } else { 1.0 };
    let mut hessian = Vec::with_capacity(columns * columns);
    for &i in &order {
        let row = &calibration.second_moment()[i * columns..(i + 1) * columns];
        // Any positive diagonal serves a dead channel: nothing couples it to the others.
        hessian.extend(order.iter().map(|&j| if i == j && energies[i] == 0.0 { mean } else { row[j] }));
    }
    let InverseCholesky { upper, damping } = InverseCholesky::new(&hessian, columns, options.damping * mean)?;
    drop(hessian);

    let size = options.group_size.columns(columns);
    let sweep = Sweep {
        weight,
        rule: GridRule::new(options),
        static_groups: options.static_groups,
        size,
        groups: options.group_size.groups(columns),
        group_of: match options.static_groups {
            true => order.iter().map(|&column| column / size).collect(),
            false => (0..columns).map(|position| position / size).collect(),
        },
        dead: energies.iter().map(|&energy| energy == 0.0).collect(),
        blocks: cut_blocks(columns, block, size, options.static_groups),
        order,
        upper,
    };
    let swept = pool.map(rows.div_ceil(ROWS), |index| sweep.rows(index * ROWS..rows.min((index + 1) * ROWS)));

    let mut codes = Vec::with_capacity(rows * columns);
    let mut grids = Vec::with_capacity(rows * sweep.groups);
    let mut energy = 0.0;
    for part in swept {
        codes.extend(part.codes);
        grids.extend(part.grids);
        energy += part.energy;
    }
    let matrix = assemble(weight, options, codes, &grids, sweep.group_index())?;
    Ok(GptqSolution { matrix, energy, damping })
}

/// Cuts the columns into blocks of at most `block` such that no group that is fitted during the sweep begins inside a
/// block and ends behind it: its last columns would lack the corrections of the block.
fn cut_blocks(columns: usize, block: usize, group: usize, static_groups: bool) -> Vec<Range<usize>> {
    let mut blocks = Vec::new();
    let mut start = 0;
    while start < columns {
        let mut end = columns.min(start + block);
        let boundary = end / group * group;
        if !static_groups && end < columns && boundary > start {
            end = boundary;
        }
        blocks.push(start..end);
        start = end;
    }
    blocks
}

/// What all rows share. A position is a place in the order of the sweep, `order[position]` the column there.
struct Sweep<'a> {
    weight: &'a DenseMatrix,
    rule: GridRule,
    static_groups: bool,
    /// Columns of a full group.
    size: usize,
    groups: usize,
    /// Group of each position.
    group_of: Vec<usize>,
    /// Per column: no token ever activated it.
    dead: Vec<bool>,
    blocks: Vec<Range<usize>>,
    order: Vec<usize>,
    /// U, by position.
    upper: Vec<f64>,
}

struct SweptRows {
    codes: Vec<u8>,
    grids: Vec<Grid>,
    energy: f64,
}

impl Sweep<'_> {
    fn rows(&self, rows: Range<usize>) -> SweptRows {
        let (columns, groups, count) = (self.order.len(), self.groups, rows.len());
        let mut weights = vec![0.0f64; count * columns];
        let mut grids = Vec::with_capacity(count * groups);
        let mut values = vec![0.0f32; columns];
        for (row, weights) in rows.zip(weights.chunks_exact_mut(columns)) {
            self.weight.row_to_f32(row, &mut values);
            for (value, &dead) in values.iter_mut().zip(&self.dead) {
                *value = if dead { 0.0 } else { *value };
            }
            // Grids that are fitted later start from these as well; they are overwritten.
            let fit = |group: &[f32]| self.rule.fit(group.iter().map(|&value| f64::from(value)));
            grids.extend(values.chunks(self.size).map(fit));
            for (weight, &column) in weights.iter_mut().zip(&self.order) {
                *weight = f64::from(values[column]);
            }
        }
        let mut swept = SweptRows { codes: vec![0; count * columns], grids, energy: 0.0 };
        let mut errors = Vec::new();
        for block in &self.blocks {
            errors.clear();
            errors.resize(count * block.len(), 0.0);
            for row in 0..count {
                swept.energy += self.sweep_block(
                    block.clone(),
                    &mut weights[row * columns..(row + 1) * columns],
                    &mut swept.grids[row * groups..(row + 1) * groups],
                    &mut swept.codes[row * columns..(row + 1) * columns],
                    &mut errors[row * block.len()..(row + 1) * block.len()],
                );
            }
            let behind = block.end..columns;
            let coupling =
                MatrixView::new(&self.upper, columns, columns).row_range(block.clone()).column_range(behind.clone());
            subtract_product(
                MatrixViewMut::new(&mut weights, count, columns).column_range(behind),
                MatrixView::new(&errors, count, block.len()),
                coupling,
            );
        }
        swept
    }

    /// Rounds the positions of a block in one row, correcting those behind them inside the block. Returns `Σ e²`.
    fn sweep_block(
        &self,
        block: Range<usize>,
        weights: &mut [f64],
        grids: &mut [Grid],
        codes: &mut [u8],
        errors: &mut [f64],
    ) -> f64 {
        let columns = weights.len();
        let mut energy = 0.0;
        for position in block.clone() {
            let group = self.group_of[position];
            if !self.static_groups && position % self.size == 0 {
                let end = columns.min(position + self.size);
                grids[group] = self.rule.fit(weights[position..end].iter().copied());
            }
            let grid = grids[group];
            let code = grid.code(weights[position]);
            let upper = &self.upper[position * columns..(position + 1) * columns];
            let error = (weights[position] - f64::from(grid.value(code))) / upper[position];
            for (weight, u) in weights[position + 1..block.end].iter_mut().zip(&upper[position + 1..block.end]) {
                *weight -= error * u;
            }
            codes[self.order[position]] = code;
            errors[position - block.start] = error;
            energy += error * error;
        }
        energy
    }

    /// The group of each column, where it is not the column's own position that tells it.
    fn group_index(&self) -> Option<Vec<u32>> {
        let mut index = vec![0; self.order.len()];
        for (&column, &group) in self.order.iter().zip(&self.group_of) {
            index[column] = group as u32;
        }
        let usual = index.iter().enumerate().all(|(column, &group)| column / self.size == group as usize);
        (!usual).then_some(index)
    }
}
