use std::ops::Range;
use std::sync::Arc;

use kintsugi_runtime::ThreadPool;

use crate::Kernels;
use crate::accumulate::PanelJob;
use crate::aligned_bytes::AlignedBytes;
use crate::grid_parameters::GridParameters;
use crate::integer_product::IntegerJob;
use crate::integer_strip::IntegerStripJob;
use crate::late::Late;
use crate::packed_input::PackedInput;
use crate::packed_matrix::{Arithmetic, Compensation, PackedMatrix, Section};
use crate::shared_rows::SharedRows;
use crate::strip::StripJob;
use crate::tiled_input::{TileBlock, TiledInput};
use crate::vector::LANES;

/// Multiplications that are worth a task of their own: some microseconds.
const TASK_MULTIPLICATIONS: usize = 1 << 18;

/// Panels from which on it pays to lay out floats tile by tile: they are laid out once, and read once for each panel. A single one is not worth it.
const LEAST_TILED_PANELS: usize = 2;

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

/// A matrix and the rows of x that it is multiplied with, packed.
pub(crate) struct Operands<'a> {
    weight: &'a PackedMatrix,
    count: usize,
    /// The row of y of each row of x; `None` where that is the row itself.
    places: Option<Vec<usize>>,
    arithmetic: Arithmetic,
    /// Whether x is packed in tiles.
    tiled: bool,
    input: Late<Arc<Input>>,
    /// A x, where there is a compensation.
    projected: Late<Input>,
}

/// Rows of x, packed.
enum Input {
    /// For products of a few rows at a time.
    Rows(PackedInput),
    /// For products of all rows with one panel after another, in strips.
    Tiles(TiledInput),
}

impl Input {
    /// Whether so many rows are worth tiles.
    fn is_tiled(kernels: &Kernels, section: &Section, arithmetic: Arithmetic, count: usize, panels: usize) -> bool {
        let table = kernels.table();
        match arithmetic {
            Arithmetic::Int8 => count >= table.integers.least_strip_rows(section.encoding),
            Arithmetic::F32 | Arithmetic::Bf16 => panels >= LEAST_TILED_PANELS && count >= table.strip.least_rows,
        }
    }

    fn new(
        kernels: &Kernels,
        section: &Section,
        arithmetic: Arithmetic,
        tiled: bool,
        x: &[f32],
        columns: usize,
        pool: &ThreadPool,
    ) -> Self {
        let table = kernels.table();
        if tiled {
            Input::Tiles(TiledInput::new(table, section, arithmetic, x, columns, pool))
        } else {
            Input::Rows(PackedInput::new(table, section, arithmetic, x, columns, pool))
        }
    }

    /// # Panics
    /// Where x is packed in tiles.
    fn rows(&self) -> &PackedInput {
        match self {
            Input::Rows(input) => input,
            Input::Tiles(_) => unreachable!("tiles are multiplied panel by panel"),
        }
    }
}

impl<'a> Operands<'a> {
    /// A matrix and the rows of x, which are packed as for one of `others`, which read the same x, where it reads them
    /// alike.
    pub(crate) fn new<'b>(
        kernels: &Kernels,
        weight: &'a PackedMatrix,
        x: &[f32],
        others: impl Iterator<Item = &'b Operands<'b>> + Clone,
        pool: &ThreadPool,
    ) -> Self {
        let mut operands = Operands::awaiting(kernels, weight, x.len() / weight.columns, None);
        // Rather one whose codes have the same centre, which need not be copied.
        let as_it_is = others.clone().find(|other| operands.reads_like(other) && operands.moved(kernels, other) == 0);
        let known = as_it_is.or_else(|| others.clone().find(|other| operands.reads_like(other)));
        let known = known.map(|other| operands.input_of(kernels, other, pool));
        operands.input = Late::ready(known.unwrap_or_else(|| operands.pack(kernels, x, pool)));
        operands
    }

    /// A matrix whose rows of x, that many, are [received](Self::receive) from a task. `places` are the rows of y that they
    /// go to.
    pub(crate) fn awaiting(
        kernels: &Kernels,
        weight: &'a PackedMatrix,
        count: usize,
        places: Option<Vec<usize>>,
    ) -> Self {
        let arithmetic = kernels.arithmetic(weight);
        let tiled = Input::is_tiled(kernels, &weight.main, arithmetic, count, weight.panel_count());
        Operands { weight, count, places, arithmetic, tiled, input: Late::pending(), projected: Late::pending() }
    }

    /// Whether x is packed for both in the same way, but for the centre of their codes.
    fn reads_like(&self, other: &Operands<'_>) -> bool {
        (self.arithmetic, self.tiled) == (other.arithmetic, other.tiled)
            && self.weight.main.reads_like(&other.weight.main)
    }

    /// How much larger the centre of the codes is than that of another matrix, where x knows of it.
    fn moved(&self, kernels: &Kernels, other: &Operands<'_>) -> i32 {
        let centre = |weight: &PackedMatrix| (kernels.table().integers.centre)(weight.main.encoding);
        let known = self.tiled && self.arithmetic == Arithmetic::Int8;
        if known { centre(self.weight) - centre(other.weight) } else { 0 }
    }

    /// The packed x of another matrix that [reads](Self::reads_like) the same x alike.
    fn input_of(&self, kernels: &Kernels, other: &Operands<'_>, pool: &ThreadPool) -> Arc<Input> {
        let (input, moved) = (other.input.wait(), self.moved(kernels, other));
        match &**input {
            Input::Tiles(tiles) if moved != 0 => {
                Arc::new(Input::Tiles(tiles.recentred(kernels.table(), &self.weight.main, moved, pool)))
            }
            _ => Arc::clone(input),
        }
    }

    /// Rows of x, as the matrix reads them.
    fn pack(&self, kernels: &Kernels, x: &[f32], pool: &ThreadPool) -> Arc<Input> {
        let Operands { weight, arithmetic, tiled, .. } = self;
        Arc::new(Input::new(kernels, &weight.main, *arithmetic, *tiled, x, weight.columns, pool))
    }

    /// Takes `A x`, `[count, rank]`, for which products with this matrix may be waiting: with B of its compensation, or with
    /// itself where it is a B.
    pub(crate) fn receive(&self, kernels: &Kernels, projected: &[f32], pool: &ThreadPool) {
        let Some(Compensation { a, b, .. }) = &self.weight.compensation else {
            self.input.set(self.pack(kernels, projected, pool));
            return;
        };
        // Whoever multiplies a few rows at a time does so with both parts.
        let tiled = self.panel_by_panel()
            && Input::is_tiled(kernels, b, Arithmetic::F32, self.count, self.weight.panel_count());
        self.projected.set(Input::new(kernels, b, Arithmetic::F32, tiled, projected, a.rows, pool));
    }

    /// Lets those panic that wait for what will not be [received](Self::receive).
    pub(crate) fn abandon(&self) {
        self.input.abandon();
        self.projected.abandon();
    }

    /// B and A x, as soon as that is there; `None` without a compensation.
    fn low_rank_part(&self) -> Option<(&Section, &Input)> {
        self.weight.compensation.as_ref().map(|part| (&part.b, self.projected.wait()))
    }

    /// The matrix.
    pub(crate) fn weight(&self) -> &'a PackedMatrix {
        self.weight
    }

    /// Rows of x.
    pub(crate) fn count(&self) -> usize {
        self.count
    }

    /// Whether panels are multiplied one by one, with all rows.
    fn panel_by_panel(&self) -> bool {
        self.arithmetic == Arithmetic::Int8 || self.tiled
    }

    /// Panels that are multiplied at once.
    fn panels_at_once(&self, kernels: &Kernels) -> usize {
        if self.count <= 2 && !self.panel_by_panel() { kernels.table().few_row_panels } else { 1 }
    }

    /// Runs of panels that are multiplied at once.
    pub(crate) fn units(&self, kernels: &Kernels) -> usize {
        self.weight.panel_count().div_ceil(self.panels_at_once(kernels))
    }

    /// How many tasks the product is worth, where that many units can be shared out. A folded matrix has `folds` rows of x for
    /// each.
    pub(crate) fn tasks(&self, units: usize, task_bytes: usize, folds: usize) -> usize {
        let multiplications = self.weight.panel_count() * LANES * self.weight.columns * self.count;
        let bytes = self.weight.panel_count() * self.weight.panel_bytes;
        // With few rows the panels take the time, else the multiplications.
        let tasks = if self.count <= 2 * folds { bytes / task_bytes } else { multiplications / TASK_MULTIPLICATIONS };
        tasks.clamp(1, units)
    }

    /// One of the tasks.
    pub(crate) fn run(&self, kernels: &Kernels, task: usize, tasks: usize, y: &SharedRows<'_>, output: Output) {
        let panels = self.weight.panel_count();
        let at_once = self.panels_at_once(kernels);
        let units = self.units(kernels);
        for unit in task * units / tasks..(task + 1) * units / tasks {
            let first = unit * at_once;
            let last = panels.min(first + at_once);
            if self.panel_by_panel() {
                self.multiply_panel(kernels, first, y, output);
            } else if last - first == at_once {
                self.multiply_panels(kernels, first, at_once, y, output);
            } else {
                (first..last).for_each(|panel| self.multiply_panels(kernels, panel, 1, y, output));
            }
        }
    }

    /// The runs of blocks that have sums of their own where panels are too few to share out.
    pub(crate) fn runs(&self) -> Vec<Range<usize>> {
        self.weight.main.layout.runs()
    }

    /// The products of one panel over one of the [runs](Self::runs), `[count]`.
    pub(crate) fn add_run(&self, kernels: &Kernels, panel: usize, run: Range<usize>, sums: &mut [[f32; LANES]]) {
        if self.arithmetic == Arithmetic::Int8 {
            self.add_integers(kernels, panel, run, sums);
        } else {
            self.add_rows(kernels, &self.weight.main, self.arithmetic, self.input.wait(), panel, run, sums);
        }
    }

    /// All rows with one panel: in int8, or many rows.
    fn multiply_panel(&self, kernels: &Kernels, panel: usize, y: &SharedRows<'_>, output: Output) {
        let mut tile = Tile([[0.0; LANES]; MAX_TILE]);
        let mut more;
        let sums = if self.count <= MAX_TILE {
            &mut tile.0[..self.count]
        } else {
            // Registers are as long as a line of the cache, and none should straddle two.
            more = AlignedBytes::zeroed(self.count * size_of::<[f32; LANES]>());
            bytemuck::cast_slice_mut(more.as_mut_slice())
        };
        if self.arithmetic == Arithmetic::Int8 {
            self.add_integers(kernels, panel, 0..self.weight.main.layout.steps.len(), sums);
        } else {
            self.add_all_rows(kernels, &self.weight.main, self.arithmetic, self.input.wait(), panel, sums);
        }
        if let Some((b, projected)) = self.low_rank_part() {
            self.add_all_rows(kernels, b, Arithmetic::F32, projected, panel, sums);
        }
        self.write(panel, 1, 0, self.count, sums, y, output);
    }

    /// Adds the products of one panel of the main matrix in int8 over some of its blocks, `[count]`.
    fn add_integers(&self, kernels: &Kernels, panel: usize, blocks: Range<usize>, sums: &mut [[f32; LANES]]) {
        let main = &self.weight.main;
        let (Some(integers), Some(grid)) = (&main.integers, main.grid) else { return };
        assert!(panel < self.weight.panel_count() && sums.len() == self.count);
        let (products, rows) = (&kernels.table().integers, self.count);
        let steps = &main.layout.steps[blocks.clone()];
        // What lies before the blocks.
        let before = main.layout.steps[..blocks.start].iter().map(|&steps| steps as usize).sum::<usize>();
        let bytes = before * main.encoding.step_bytes() + blocks.start * grid.bytes();
        let words = before * main.layout.step_columns / Arithmetic::Int8.columns_per_word();
        let panel = self.weight.panels.as_slice()[panel * self.weight.panel_bytes + main.offset + bytes..].as_ptr();
        let input = match &**self.input.wait() {
            Input::Rows(input) => input,
            Input::Tiles(input) => {
                let job = IntegerStripJob {
                    panel,
                    steps,
                    grid,
                    table: &integers.table,
                    // Blocks of a tile follow one another.
                    x: input
                        .words()
                        .wrapping_add((words + blocks.start * TileBlock::INTEGER_WORDS) * products.tile_rows),
                    tile_stride: input.stride(),
                    rows,
                    tile: sums.as_mut_ptr().cast(),
                };
                // SAFETY: as below.
                unsafe { (products.accumulate_strip)(main.encoding)(&job) };
                return;
            }
        };
        let passes = rows.div_ceil(products.most_rows);
        for pass in 0..passes {
            let start = pass * rows / passes;
            let rows = (pass + 1) * rows / passes - start;
            let job = IntegerJob {
                panel,
                steps,
                grid,
                table: &integers.table,
                x: input.row(start).wrapping_add(words),
                blocks: input.quantized_blocks(start).wrapping_add(blocks.start),
                x_stride: input.stride(),
                tile: sums[start..].as_mut_ptr().cast(),
            };
            let accumulate = (products.accumulate)(main.encoding, rows);
            // SAFETY: the table is of a level that this CPU has; each panel holds the section at its offset, in blocks of
            // the length that int8 has, the input was packed in the layout of the section, and panel and sums are checked
            // above.
            unsafe { accumulate(&job) };
        }
    }

    /// Adds the products of one panel of a section in f32 or bf16, `[count]`.
    fn add_all_rows(
        &self,
        kernels: &Kernels,
        section: &Section,
        arithmetic: Arithmetic,
        input: &Input,
        panel: usize,
        sums: &mut [[f32; LANES]],
    ) {
        self.add_rows(kernels, section, arithmetic, input, panel, 0..section.layout.steps.len(), sums);
    }

    /// Adds the products of one panel of a section in f32 or bf16 over some of its blocks, `[count]`.
    fn add_rows(
        &self,
        kernels: &Kernels,
        section: &Section,
        arithmetic: Arithmetic,
        input: &Input,
        panel: usize,
        blocks: Range<usize>,
        sums: &mut [[f32; LANES]],
    ) {
        assert!(panel < self.weight.panel_count() && sums.len() == self.count);
        let (table, layout) = (kernels.table(), &section.layout);
        let columns =
            layout.steps[..blocks.start].iter().map(|&steps| steps as usize).sum::<usize>() * layout.step_columns;
        let words = columns / arithmetic.columns_per_word();
        let bytes = columns / layout.step_columns * section.encoding.step_bytes()
            + blocks.start * section.grid.map_or(0, GridParameters::bytes);
        match input {
            Input::Rows(input) => {
                for start in (0..self.count).step_by(table.tile_rows) {
                    let rows = table.tile_rows.min(self.count - start);
                    let whole = self.panel_job(section, input, panel, start, &mut sums[start..]);
                    // SAFETY: the blocks lie in the panel and in the rows of x, behind those before them.
                    let (panels, x) = unsafe { (whole.panels.add(bytes), whole.x.add(words)) };
                    // There are no block sums where none are read.
                    let block_sums = whole.block_sums.wrapping_add(blocks.start);
                    let job = PanelJob { panels, x, block_sums, steps: &layout.steps[blocks.clone()], ..whole };
                    // SAFETY: as in `add_section`.
                    unsafe { (table.accumulate)(section.encoding, arithmetic, rows, 1)(&job) };
                }
            }
            Input::Tiles(input) => {
                let block_sums = usize::from(section.grid.is_some_and(GridParameters::needs_block_sums));
                let start = panel * self.weight.panel_bytes + section.offset + bytes;
                let job = StripJob {
                    panel: self.weight.panels.as_slice()[start..].as_ptr(),
                    steps: &layout.steps[blocks.clone()],
                    grid: section.grid,
                    table: section.table.values(),
                    // Blocks of a tile follow one another.
                    x: input.words().wrapping_add((words + blocks.start * block_sums) * table.strip.tile_rows),
                    tile_stride: input.stride(),
                    rows: self.count,
                    tile: sums.as_mut_ptr().cast(),
                };
                // SAFETY: as in `add_section`, with rows packed in tiles.
                unsafe { (table.strip.accumulate)(section.encoding, arithmetic)(&job) };
            }
        }
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
            add(&self.weight.main, self.arithmetic, self.input.wait().rows());
            if let Some((b, projected)) = self.low_rank_part() {
                add(b, Arithmetic::F32, projected.rows());
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

    /// Writes the products of some rows with some panels, `[rows][panels]`, to their places.
    pub(crate) fn write(
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
            let place = self.places.as_ref().map_or(start + row, |places| places[start + row]);
            for panel in 0..panels {
                let outputs = (first + panel) * LANES..self.weight.rows.min((first + panel + 1) * LANES);
                // SAFETY: within these operands the outputs of a panel are written by the one task that has the panel,
                // one slice at a time. Other operands that write at the same time have another y, those of `multiply`, or
                // other rows, those of `accumulate_updates` by its requirement, which `accumulate_low_ranks` checks.
                let y = unsafe { y.slice(place, outputs.clone()) };
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
