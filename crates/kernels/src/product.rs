use kintsugi_runtime::ThreadPool;

use crate::Kernels;
use crate::accumulate::PanelJob;
use crate::integer_product::IntegerJob;
use crate::packed_input::PackedInput;
use crate::packed_matrix::{Arithmetic, PackedMatrix, Section};
use crate::shared_rows::SharedRows;
use crate::strip::StripJob;
use crate::vector::LANES;

/// Rows of x that are packed at once; the weights are read once per so many rows. Packed, they stay in the cache of
/// a core beside a panel.
const ROWS_AT_ONCE: usize = 128;

/// Multiplications that are worth a task of their own: some microseconds.
const TASK_MULTIPLICATIONS: usize = 1 << 18;

/// Most rows of x that any level takes at once.
const MAX_TILE: usize = 8;

/// What happens to the products.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Output {
    /// y = W x + B (A x) + bias
    Set,
    /// y += W x + B (A x) + bias
    Add,
}

/// The products of a few rows with a few panels.
#[repr(align(64))]
struct Tile([[f32; LANES]; MAX_TILE]);

/// Multiplies every row of `x`, `[count, columns]`, into `y`, `[count, rows]`.
pub(crate) fn multiply(
    kernels: &Kernels,
    weight: &PackedMatrix,
    x: &[f32],
    y: &mut [f32],
    output: Output,
    pool: &ThreadPool,
) {
    let x = x.chunks(ROWS_AT_ONCE * weight.columns);
    for (x, y) in x.zip(y.chunks_mut(ROWS_AT_ONCE * weight.rows)) {
        let operands = Operands::new(kernels, weight, x, pool);
        operands.multiply(kernels, y, output, pool);
    }
}

/// A matrix and the rows of x that it is multiplied with, packed.
struct Operands<'a> {
    weight: &'a PackedMatrix,
    count: usize,
    arithmetic: Arithmetic,
    input: PackedInput,
    /// A x, where there is a compensation.
    projected: Option<PackedInput>,
}

impl<'a> Operands<'a> {
    fn new(kernels: &Kernels, weight: &'a PackedMatrix, x: &[f32], pool: &ThreadPool) -> Self {
        let count = x.len() / weight.columns;
        let arithmetic = kernels.arithmetic(weight);
        let input = PackedInput::new(kernels.table(), &weight.main, arithmetic, x, weight.columns, pool);
        let projected = weight.compensation.as_ref().map(|part| {
            let rank = part.a.rows;
            let mut projected = vec![0.0; count * rank];
            multiply(kernels, &part.a, x, &mut projected, Output::Set, pool);
            PackedInput::new(kernels.table(), &part.b, Arithmetic::F32, &projected, rank, pool)
        });
        Operands { weight, count, arithmetic, input, projected }
    }

    fn multiply(&self, kernels: &Kernels, y: &mut [f32], output: Output, pool: &ThreadPool) {
        let table = kernels.table();
        let panels = self.weight.panel_count();
        let panels_at_once = if self.count <= 2 { table.few_row_panels } else { 1 };
        let units = panels.div_ceil(panels_at_once);
        let multiplications = panels * LANES * self.weight.columns * self.count;
        let tasks = (multiplications / TASK_MULTIPLICATIONS).clamp(1, units);
        let y = SharedRows::new(y, self.weight.rows);
        let in_strips = self.arithmetic == Arithmetic::F32 && self.count >= table.strip.least_rows;
        if in_strips || self.arithmetic == Arithmetic::Int8 {
            let tasks = (multiplications / TASK_MULTIPLICATIONS).clamp(1, panels);
            pool.for_each(tasks, |task| {
                for panel in task * panels / tasks..(task + 1) * panels / tasks {
                    self.multiply_panel(kernels, panel, &y, output);
                }
            });
            return;
        }
        pool.for_each(tasks, |task| {
            for unit in task * units / tasks..(task + 1) * units / tasks {
                let first = unit * panels_at_once;
                let last = panels.min(first + panels_at_once);
                if last - first == panels_at_once {
                    self.multiply_panels(kernels, first, panels_at_once, &y, output);
                } else {
                    (first..last).for_each(|panel| self.multiply_panels(kernels, panel, 1, &y, output));
                }
            }
        });
    }

    /// All rows with one panel: in int8, or many rows in f32.
    fn multiply_panel(&self, kernels: &Kernels, panel: usize, y: &SharedRows<'_>, output: Output) {
        let mut tile = Tile([[0.0; LANES]; MAX_TILE]);
        let mut more = Vec::new();
        let sums = if self.count <= MAX_TILE {
            &mut tile.0[..self.count]
        } else {
            more.resize(self.count, [0.0; LANES]);
            &mut more[..]
        };
        if self.arithmetic == Arithmetic::Int8 {
            self.add_integers(kernels, panel, sums);
        } else {
            self.add_strip(kernels, &self.weight.main, &self.input, panel, sums);
        }
        if let (Some(part), Some(projected)) = (&self.weight.compensation, &self.projected) {
            if self.count >= kernels.table().strip.least_rows {
                self.add_strip(kernels, &part.b, projected, panel, sums);
            } else {
                for start in (0..self.count).step_by(kernels.table().tile_rows) {
                    let rows = kernels.table().tile_rows.min(self.count - start);
                    let sums = &mut sums[start..];
                    self.add_section(kernels, &part.b, Arithmetic::F32, projected, panel, 1, start, rows, sums);
                }
            }
        }
        self.write(panel, 1, 0, self.count, sums, y, output);
    }

    /// Adds the products of one panel of the main matrix in int8, `[count]`.
    fn add_integers(&self, kernels: &Kernels, panel: usize, sums: &mut [[f32; LANES]]) {
        let main = &self.weight.main;
        let (Some(integers), Some(grid)) = (&main.integers, main.grid) else { return };
        assert!(panel < self.weight.panel_count() && sums.len() == self.count);
        let job = IntegerJob {
            panel: self.weight.panels.as_slice()[panel * self.weight.panel_bytes + main.offset..].as_ptr(),
            steps: &main.layout.steps,
            grid,
            table: &integers.table,
            x: self.input.row(0),
            blocks: self.input.quantized_blocks(0),
            x_stride: self.input.stride(),
            rows: self.count,
            tile: sums.as_mut_ptr().cast(),
        };
        let products = &kernels.table().integers;
        let accumulate = if self.count <= products.most_rows {
            (products.accumulate)(main.encoding, self.count)
        } else {
            (products.accumulate_strip)(main.encoding)
        };
        // SAFETY: the table is of a level that this CPU has; each panel holds the section at its offset, in blocks of
        // the length that int8 has, the input was packed in the layout of the section, and panel and sums are checked
        // above.
        unsafe { accumulate(&job) };
    }

    /// Adds the products of one panel of a section in f32, `[count]`.
    fn add_strip(
        &self,
        kernels: &Kernels,
        section: &Section,
        input: &PackedInput,
        panel: usize,
        sums: &mut [[f32; LANES]],
    ) {
        assert!(panel < self.weight.panel_count() && sums.len() == self.count);
        let panel = self.panel_job(section, input, panel, 0, sums);
        let job = StripJob { panel, rows: self.count };
        // SAFETY: as in `add_section`.
        unsafe { (kernels.table().strip.accumulate)(section.encoding)(&job) };
    }

    /// All rows with some panels: tiles of as equal a size as can be.
    fn multiply_panels(&self, kernels: &Kernels, first: usize, panels: usize, y: &SharedRows<'_>, output: Output) {
        let tiles = self.count.div_ceil(kernels.table().tile_rows);
        for tile in 0..tiles {
            let start = tile * self.count / tiles;
            let rows = (tile + 1) * self.count / tiles - start;
            let mut sums = Tile([[0.0; LANES]; MAX_TILE]);
            let mut add = |section, arithmetic, input| {
                self.add_section(kernels, section, arithmetic, input, first, panels, start, rows, &mut sums.0);
            };
            add(&self.weight.main, self.arithmetic, &self.input);
            if let (Some(part), Some(projected)) = (&self.weight.compensation, &self.projected) {
                add(&part.b, Arithmetic::F32, projected);
            }
            self.write(first, panels, start, rows, &sums.0, y, output);
        }
    }

    /// Adds the products of one section to the sums, `[rows][panels]`.
    fn add_section(
        &self,
        kernels: &Kernels,
        section: &Section,
        arithmetic: Arithmetic,
        input: &PackedInput,
        first: usize,
        panels: usize,
        start: usize,
        rows: usize,
        sums: &mut [[f32; LANES]],
    ) {
        assert!(
            sums.len() >= rows * panels && first + panels <= self.weight.panel_count() && start + rows <= self.count
        );
        let job = self.panel_job(section, input, first, start, sums);
        let accumulate = (kernels.table().accumulate)(section.encoding, arithmetic, rows, panels);
        // SAFETY: the table is of a level that this CPU has, with bf16 products only where it has those; each panel
        // holds the section at its offset, the input was packed in the layout of the section, and rows, panels and
        // sums are checked above.
        unsafe { accumulate(&job) };
    }

    /// The operands of a section from panel `first` and row `start` on.
    fn panel_job<'b>(
        &self,
        section: &'b Section,
        input: &PackedInput,
        first: usize,
        start: usize,
        sums: &mut [[f32; LANES]],
    ) -> PanelJob<'b> {
        let stride = self.weight.panel_bytes;
        PanelJob {
            panels: self.weight.panels.as_slice()[first * stride + section.offset..].as_ptr(),
            panel_stride: stride,
            steps: &section.layout.steps,
            grid: section.grid,
            table: section.table.values(),
            x: input.row(start),
            x_stride: input.stride(),
            block_sums: input.block_sums(start),
            tile: sums.as_mut_ptr().cast(),
        }
    }

    fn write(
        &self,
        first: usize,
        panels: usize,
        start: usize,
        rows: usize,
        sums: &[[f32; LANES]],
        y: &SharedRows<'_>,
        output: Output,
    ) {
        for row in 0..rows {
            for panel in 0..panels {
                let outputs = (first + panel) * LANES..self.weight.rows.min((first + panel + 1) * LANES);
                // SAFETY: the outputs of a panel are written by the one task that has the panel, one slice at a time.
                let y = unsafe { y.slice(start + row, outputs.clone()) };
                let sums = &sums[row * panels + panel];
                match (&self.weight.bias, output) {
                    (None, Output::Set) => y.copy_from_slice(&sums[..outputs.len()]),
                    (Some(bias), Output::Set) => {
                        for ((y, sum), bias) in y.iter_mut().zip(sums).zip(&bias[outputs]) {
                            *y = sum + bias;
                        }
                    }
                    (None, Output::Add) => y.iter_mut().zip(sums).for_each(|(y, sum)| *y += sum),
                    (Some(bias), Output::Add) => {
                        for ((y, sum), bias) in y.iter_mut().zip(sums).zip(&bias[outputs]) {
                            *y += sum + bias;
                        }
                    }
                }
            }
        }
    }
}
