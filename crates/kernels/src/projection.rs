use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use kintsugi_runtime::ThreadPool;

use crate::Kernels;
use crate::operands::{Operands, Output};
use crate::packed_low_rank::FoldedMatrix;
use crate::shared_rows::SharedRows;
use crate::vector::LANES;

/// Bytes of panels that are worth a task of their own: all the other threads may wait for these.
const TASK_BYTES: usize = 1 << 16;

/// The products of some rows of x with an A, `[rank, in]`, and who waits for them.
///
/// Such a matrix has too few panels to share out. So runs of columns are shared out too. Each has sums of its own, which
/// are added in the order of the runs.
pub(crate) struct Projection<'a> {
    operands: Operands<'a>,
    /// Where A is folded, and the rows of x with it.
    folded: Option<&'a FoldedMatrix>,
    /// What `A x` is multiplied with.
    scaling: f32,
    runs: Vec<Range<usize>>,
    /// The sums of each task: `[panels and runs][count]`.
    sums: Vec<OnceLock<Vec<[f32; LANES]>>>,
    /// Tasks that are not done.
    left: AtomicUsize,
    /// Which of the operands of the call.
    consumers: Vec<usize>,
}

impl<'a> Projection<'a> {
    /// A x, for A of a compensation.
    pub(crate) fn new(operands: Operands<'a>) -> Self {
        Projection::of(operands, None, 1.0)
    }

    /// `scaling · A x`, for A of an update. The rows of x are as A is.
    pub(crate) fn of_update(
        a: &'a FoldedMatrix,
        scaling: f32,
        kernels: &Kernels,
        x: &[f32],
        pool: &ThreadPool,
    ) -> Self {
        Projection::of(Operands::new(kernels, &a.matrix, x, [].iter(), pool), Some(a), scaling)
    }

    fn of(operands: Operands<'a>, folded: Option<&'a FoldedMatrix>, scaling: f32) -> Self {
        let runs = operands.runs();
        let units = operands.weight().panel_count() * runs.len();
        let tasks = operands.tasks(units, TASK_BYTES, folded.map_or(1, |a| a.folds));
        let sums = (0..tasks).map(|_| OnceLock::new()).collect();
        Projection { operands, folded, scaling, runs, sums, left: AtomicUsize::new(tasks), consumers: Vec::new() }
    }

    /// A and x.
    pub(crate) fn operands(&self) -> &Operands<'a> {
        &self.operands
    }

    /// Names one of the operands of the call that waits for the products.
    pub(crate) fn feed(&mut self, consumer: usize) {
        self.consumers.push(consumer);
    }

    /// Number of tasks.
    pub(crate) fn tasks(&self) -> usize {
        self.sums.len()
    }

    /// One of the tasks. Whoever ends the last hands the products to those of `operands` that wait for them.
    pub(crate) fn run(&self, kernels: &Kernels, task: usize, operands: &[Operands<'_>], pool: &ThreadPool) {
        let consumers = Consumers(self.consumers.iter().map(|&consumer| &operands[consumer]).collect());
        let (count, runs) = (self.operands.count(), self.runs.len());
        let units = self.operands.weight().panel_count() * runs;
        let range = task * units / self.tasks()..(task + 1) * units / self.tasks();
        let mut sums = vec![[0.0f32; LANES]; range.len() * count];
        for (unit, sums) in range.zip(sums.chunks_exact_mut(count)) {
            self.operands.add_run(kernels, unit / runs, self.runs[unit % runs].clone(), sums);
        }
        let _ = self.sums[task].set(sums);
        if self.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            let projected = self.add_up();
            consumers.0.iter().for_each(|consumer| consumer.receive(kernels, &projected, pool));
        }
    }

    /// `scaling · A x`, `[count, rank]`, of the sums of all tasks.
    fn add_up(&self) -> Vec<f32> {
        let (weight, count) = (self.operands.weight(), self.operands.count());
        let mut y = vec![0.0; count * weight.rows];
        let shared = SharedRows::new(&mut y, weight.rows);
        let done = self.sums.iter().map(|sums| sums.get().expect("every task is done"));
        let mut units = done.flat_map(|sums| sums.chunks_exact(count));
        let mut totals = vec![[0.0; LANES]; count];
        for panel in 0..weight.panel_count() {
            totals.as_flattened_mut().fill(0.0);
            for run in units.by_ref().take(self.runs.len()) {
                for (total, sum) in totals.as_flattened_mut().iter_mut().zip(run.as_flattened()) {
                    *total += sum;
                }
            }
            self.operands.write(panel, 1, 0, count, &totals, &shared, Output::Set);
        }
        let mut y = match self.folded {
            Some(a) => a.unfold(y),
            None => y,
        };
        y.iter_mut().for_each(|value| *value *= self.scaling);
        y
    }
}

/// Operands that wait for a projection, and must not do so for ever when it panics.
struct Consumers<'a>(Vec<&'a Operands<'a>>);

impl Drop for Consumers<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.iter().for_each(|consumer| consumer.abandon());
        }
    }
}
