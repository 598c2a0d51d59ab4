use std::ops::Range;
use std::sync::Arc;

use kintsugi_runtime::ThreadPool;

use crate::accumulate::PanelJob;
use crate::aligned_bytes::AlignedBytes;
use crate::grid_parameters::GridParameters;
use crate::integer_product::IntegerJob;
use crate::integer_strip::IntegerStripJob;
use crate::packed_input::PackedInput;
use crate::packed_matrix::{Arithmetic, PackedMatrix, Section};
use crate::shared_rows::SharedRows;
use crate::strip::StripJob;
use crate::tiled_input::TiledInput;
use crate::vector::LANES;
use crate::{Kernels, PackedLowRank};

/// Rows of x that are packed at once; the weights are read once per so many rows. Packed, they stay in the cache of
/// a core beside a panel.
const ROWS_AT_ONCE: usize = 128;

/// Multiplications that are worth a task of their own: some microseconds.
const TASK_MULTIPLICATIONS: usize = 1 << 18;

/// Bytes of panels that are worth a task of their own: with one row of x they take longer than its multiplications.
const TASK_BYTES: usize = 1 << 18;

/// The same for runs of columns: all the other threads wait for these.
const RUNS_TASK_BYTES: usize = TASK_BYTES / 4;

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

/// Multiplies every row of `x`, `[count, columns]`, with each of the matrices into its output, `[count, rows]`.
pub(crate) fn multiply(
    kernels: &Kernels,
    weights: &[&PackedMatrix],
    x: &[f32],
    outputs: &mut [&mut [f32]],
    pool: &ThreadPool,
) {
    let Some(columns) = weights.first().map(|weight| weight.columns) else { return };
    for (chunk, x) in x.chunks(ROWS_AT_ONCE * columns).enumerate() {
        let operands = Operands::of_one_input(kernels, weights, x, pool);
        let rows = chunk * ROWS_AT_ONCE..chunk * ROWS_AT_ONCE + x.len() / columns;
        let outputs: Vec<SharedRows<'_>> = weights
            .iter()
            .zip(outputs.iter_mut())
            .map(|(weight, y)| SharedRows::new(&mut y[rows.start * weight.rows..rows.end * weight.rows], weight.rows))
            .collect();
        let products: Vec<_> = operands.iter().zip(&outputs).collect();
        multiply_all(kernels, &products, Output::Set, pool);
    }
}

/// Some rows of x with an update of their own; each at most once.
pub(crate) struct UpdatedRows<'a> {
    pub(crate) update: &'a PackedLowRank,
    pub(crate) rows: Vec<usize>,
}

/// `y += scaling · B (A x)` for the rows of each update: the products with every A share a call of the pool, and those
/// with every B another.
///
/// Every update must have the shape of x and y, and no row may have two: the tasks of all updates write y at once.
pub(crate) fn accumulate_updates(
    kernels: &Kernels,
    updates: &[UpdatedRows<'_>],
    x: &[f32],
    y: &SharedRows<'_>,
    pool: &ThreadPool,
) {
    let (mut projections, mut products) = (Vec::new(), Vec::new());
    for UpdatedRows { update, rows } in updates {
        let Some((a, b)) = &update.factors else { continue };
        for rows in rows.chunks(ROWS_AT_ONCE) {
            let x: Vec<f32> = rows.iter().flat_map(|row| &x[row * a.columns..(row + 1) * a.columns]).copied().collect();
            projections.push(Operands::new(kernels, a, &x, None, &[], pool));
            products.push((b, update.scaling, rows));
        }
    }
    let projected = multiply_by_runs(kernels, &projections, pool);
    let operands: Vec<Operands<'_>> = products
        .into_iter()
        .zip(projected)
        .map(|((b, scaling, rows), mut projected)| {
            projected.iter_mut().for_each(|value| *value *= scaling);
            Operands::new(kernels, b, &projected, Some(rows.to_vec()), &[], pool)
        })
        .collect();
    let products: Vec<_> = operands.iter().map(|operands| (operands, y)).collect();
    multiply_all(kernels, &products, Output::Add, pool);
}

/// The tasks of some products, each with the rows that it goes to, in one call of the pool.
fn multiply_all(kernels: &Kernels, products: &[(&Operands<'_>, &SharedRows<'_>)], output: Output, pool: &ThreadPool) {
    let tasks: Vec<_> = products
        .iter()
        .flat_map(|&(operands, y)| {
            let tasks = operands.tasks(operands.units(kernels), TASK_BYTES);
            (0..tasks).map(move |task| (operands, y, task, tasks))
        })
        .collect();
    pool.for_each(tasks.len(), |index| {
        let (operands, y, task, tasks) = tasks[index];
        operands.run(kernels, task, tasks, y, output);
    });
}

/// Products in f32 with matrices that have few rows, `[count, rows]` each, in one call of the pool.
///
/// Such a matrix has too few panels to share out. So runs of columns are shared out too. Each has sums of its own,
/// which are added in the order of the runs.
fn multiply_by_runs(kernels: &Kernels, operands: &[Operands<'_>], pool: &ThreadPool) -> Vec<Vec<f32>> {
    let runs: Vec<Vec<Range<usize>>> = operands.iter().map(|operands| operands.weight.main.layout.runs()).collect();
    let mut tasks = Vec::new();
    for (operands, runs) in operands.iter().zip(&runs) {
        let all = operands.weight.panel_count() * runs.len();
        let count = operands.tasks(all, RUNS_TASK_BYTES);
        tasks.extend((0..count).map(|task| (operands, runs, task * all / count..(task + 1) * all / count)));
    }
    let sums = pool.map(tasks.len(), |task| {
        let (operands, runs, range) = &tasks[task];
        let mut sums = vec![[0.0f32; LANES]; range.len() * operands.count];
        for (index, sums) in range.clone().zip(sums.chunks_exact_mut(operands.count)) {
            operands.add_run(kernels, index / runs.len(), runs[index % runs.len()].clone(), sums);
        }
        sums
    });
    let sums = sums.concat();
    let mut sums = &sums[..];
    let mut outputs = Vec::with_capacity(operands.len());
    for (operands, runs) in operands.iter().zip(&runs) {
        let mut y = vec![0.0; operands.count * operands.weight.rows];
        let shared = SharedRows::new(&mut y, operands.weight.rows);
        for panel in 0..operands.weight.panel_count() {
            let mut totals = vec![[0.0; LANES]; operands.count];
            let (of_panel, after) = sums.split_at(runs.len() * operands.count);
            sums = after;
            for run in of_panel.chunks_exact(operands.count) {
                for (total, sum) in totals.as_flattened_mut().iter_mut().zip(run.as_flattened()) {
                    *total += sum;
                }
            }
            operands.write(panel, 1, 0, operands.count, &totals, &shared, Output::Set);
        }
        outputs.push(y);
    }
    outputs
}

/// A matrix and the rows of x that it is multiplied with, packed.
struct Operands<'a> {
    weight: &'a PackedMatrix,
    count: usize,
    /// The row of y of each row of x; `None` where that is the row itself.
    places: Option<Vec<usize>>,
    arithmetic: Arithmetic,
    input: Arc<Input>,
    /// A x, where there is a compensation.
    projected: Option<Input>,
}

/// Rows of x, packed.
enum Input {
    /// For products of a few rows at a time.
    Rows(PackedInput),
    /// For products of all rows with one panel after another, in strips.
    Tiles(TiledInput),
}

impl Input {
    fn new(
        kernels: &Kernels,
        section: &Section,
        arithmetic: Arithmetic,
        x: &[f32],
        columns: usize,
        panels: usize,
        pool: &ThreadPool,
    ) -> Self {
        let table = kernels.table();
        let (least, tile_rows) = match arithmetic {
            Arithmetic::Int8 => (table.integers.least_strip_rows(section.encoding), table.integers.tile_rows),
            Arithmetic::F32 | Arithmetic::Bf16 if panels < LEAST_TILED_PANELS => (usize::MAX, 0),
            Arithmetic::F32 | Arithmetic::Bf16 => (table.strip.least_rows, table.strip.tile_rows),
        };
        if x.len() / columns < least {
            return Input::Rows(PackedInput::new(table, section, arithmetic, x, columns, pool));
        }
        Input::Tiles(TiledInput::new(table, section, arithmetic, x, columns, tile_rows, pool))
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
    /// A matrix without its compensation; x is that of `others` if there are any.
    fn new(
        kernels: &Kernels,
        weight: &'a PackedMatrix,
        x: &[f32],
        places: Option<Vec<usize>>,
        others: &[Operands<'_>],
        pool: &ThreadPool,
    ) -> Self {
        let count = x.len() / weight.columns;
        let (arithmetic, panels) = (kernels.arithmetic(weight), weight.panel_count());
        let is_tiled = |panels: usize| panels >= LEAST_TILED_PANELS;
        let alike = others.iter().find(|other| {
            other.arithmetic == arithmetic
                && is_tiled(other.weight.panel_count()) == is_tiled(panels)
                && other.weight.main.reads_like(&weight.main)
        });
        let input = match alike {
            Some(other) => Arc::clone(&other.input),
            None => Arc::new(Input::new(kernels, &weight.main, arithmetic, x, weight.columns, panels, pool)),
        };
        Operands { weight, count, places, arithmetic, input, projected: None }
    }

    /// Some matrices and the rows that all of them are multiplied with. Those that read x alike get it packed once, and
    /// the products with every A share a call of the pool, each A once.
    fn of_one_input(kernels: &Kernels, weights: &[&'a PackedMatrix], x: &[f32], pool: &ThreadPool) -> Vec<Self> {
        let mut all = Vec::with_capacity(weights.len());
        let (mut factors, mut projections) = (Vec::<&Arc<PackedMatrix>>::new(), Vec::new());
        let mut places = Vec::with_capacity(weights.len());
        for &weight in weights {
            all.push(Operands::new(kernels, weight, x, None, &all, pool));
            places.push(weight.compensation.as_ref().map(|part| {
                factors.iter().position(|known| Arc::ptr_eq(known, &part.a)).unwrap_or_else(|| {
                    factors.push(&part.a);
                    projections.push(Operands::new(kernels, &part.a, x, None, &projections, pool));
                    factors.len() - 1
                })
            }));
        }
        if projections.is_empty() {
            return all;
        }
        let projected = multiply_by_runs(kernels, &projections, pool);
        for (operands, place) in all.iter_mut().zip(places) {
            operands.projected = place.and_then(|place| operands.pack_projected(kernels, &projected[place], pool));
        }
        all
    }

    /// `A x`, `[count, rank]`, as B reads it.
    fn pack_projected(&self, kernels: &Kernels, projected: &[f32], pool: &ThreadPool) -> Option<Input> {
        let part = self.weight.compensation.as_ref()?;
        let (section, rank) = (&part.b, part.a.rows);
        // Whoever multiplies a few rows at a time does so with both parts.
        if self.panel_by_panel() {
            let panels = self.weight.panel_count();
            return Some(Input::new(kernels, section, Arithmetic::F32, projected, rank, panels, pool));
        }
        Some(Input::Rows(PackedInput::new(kernels.table(), section, Arithmetic::F32, projected, rank, pool)))
    }

    /// Whether panels are multiplied one by one, with all rows.
    fn panel_by_panel(&self) -> bool {
        self.arithmetic == Arithmetic::Int8 || matches!(*self.input, Input::Tiles(_))
    }

    /// Panels that are multiplied at once.
    fn panels_at_once(&self, kernels: &Kernels) -> usize {
        if self.count <= 2 && !self.panel_by_panel() { kernels.table().few_row_panels } else { 1 }
    }

    /// Runs of panels that are multiplied at once.
    fn units(&self, kernels: &Kernels) -> usize {
        self.weight.panel_count().div_ceil(self.panels_at_once(kernels))
    }

    /// How many tasks the product is worth, where that many units can be shared out.
    fn tasks(&self, units: usize, task_bytes: usize) -> usize {
        let multiplications = self.weight.panel_count() * LANES * self.weight.columns * self.count;
        let bytes = self.weight.panel_count() * self.weight.panel_bytes;
        // With few rows the panels take the time, else the multiplications.
        let tasks = if self.count <= 2 { bytes / task_bytes } else { multiplications / TASK_MULTIPLICATIONS };
        tasks.clamp(1, units)
    }

    /// One of the tasks.
    fn run(&self, kernels: &Kernels, task: usize, tasks: usize, y: &SharedRows<'_>, output: Output) {
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

    /// The products of one panel in f32 over a run of blocks, `[count]`.
    fn add_run(&self, kernels: &Kernels, panel: usize, blocks: Range<usize>, sums: &mut [[f32; LANES]]) {
        assert_eq!(self.arithmetic, Arithmetic::F32, "runs are in f32");
        self.add_rows(kernels, &self.weight.main, self.arithmetic, &self.input, panel, blocks, sums);
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
            self.add_integers(kernels, panel, sums);
        } else {
            self.add_all_rows(kernels, &self.weight.main, self.arithmetic, &self.input, panel, sums);
        }
        if let (Some(part), Some(projected)) = (&self.weight.compensation, &self.projected) {
            self.add_all_rows(kernels, &part.b, Arithmetic::F32, projected, panel, sums);
        }
        self.write(panel, 1, 0, self.count, sums, y, output);
    }

    /// Adds the products of one panel of the main matrix in int8, `[count]`.
    fn add_integers(&self, kernels: &Kernels, panel: usize, sums: &mut [[f32; LANES]]) {
        let main = &self.weight.main;
        let (Some(integers), Some(grid)) = (&main.integers, main.grid) else { return };
        assert!(panel < self.weight.panel_count() && sums.len() == self.count);
        let (products, rows) = (&kernels.table().integers, self.count);
        let panel = self.weight.panels.as_slice()[panel * self.weight.panel_bytes + main.offset..].as_ptr();
        let input = match &*self.input {
            Input::Rows(input) => input,
            Input::Tiles(input) => {
                let job = IntegerStripJob {
                    panel,
                    steps: &main.layout.steps,
                    grid,
                    table: &integers.table,
                    x: input.words(),
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
                steps: &main.layout.steps,
                grid,
                table: &integers.table,
                x: input.row(start),
                blocks: input.quantized_blocks(start),
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
            add(&self.weight.main, self.arithmetic, self.input.rows());
            if let (Some(part), Some(projected)) = (&self.weight.compensation, &self.projected) {
                add(&part.b, Arithmetic::F32, projected.rows());
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
