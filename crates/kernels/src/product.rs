use std::sync::Arc;

use kintsugi_runtime::ThreadPool;

use crate::operands::{Operands, Output};
use crate::packed_low_rank::PackedFactors;
use crate::packed_matrix::PackedMatrix;
use crate::projection::Projection;
use crate::shared_rows::SharedRows;
use crate::{Kernels, PackedLowRank};

/// Rows of x that are packed at once; the weights are read once per so many rows. Packed, they stay in the cache of
/// a core beside a panel.
const ROWS_AT_ONCE: usize = 128;

/// Bytes of panels that are worth a task of their own: with one row of x they take longer than its multiplications.
const TASK_BYTES: usize = 1 << 18;

/// Multiplies every row of `x`, `[count, columns]`, with each of the matrices into its output, `[count, rows]`. Those that
/// read x alike get it packed once, and each A is multiplied with once.
pub(crate) fn multiply(
    kernels: &Kernels,
    weights: &[&PackedMatrix],
    x: &[f32],
    outputs: &mut [&mut [f32]],
    pool: &ThreadPool,
) {
    let Some(columns) = weights.first().map(|weight| weight.columns) else { return };
    for (chunk, x) in x.chunks(ROWS_AT_ONCE * columns).enumerate() {
        let (mut operands, mut projections) = (Vec::<Operands<'_>>::with_capacity(weights.len()), Vec::new());
        for &weight in weights {
            operands.push(Operands::new(kernels, weight, x, operands.iter(), pool));
        }
        for (consumer, weight) in weights.iter().enumerate() {
            let Some(part) = &weight.compensation else { continue };
            let is_same =
                |projection: &Projection<'_>| std::ptr::eq(projection.operands().weight(), Arc::as_ptr(&part.a));
            let known = projections.iter().position(is_same).unwrap_or_else(|| {
                let others = operands.iter().chain(projections.iter().map(Projection::operands));
                projections.push(Projection::new(Operands::new(kernels, &part.a, x, others, pool)));
                projections.len() - 1
            });
            projections[known].feed(consumer);
        }
        let rows = chunk * ROWS_AT_ONCE..chunk * ROWS_AT_ONCE + x.len() / columns;
        let outputs: Vec<SharedRows<'_>> = weights
            .iter()
            .zip(outputs.iter_mut())
            .map(|(weight, y)| SharedRows::new(&mut y[rows.start * weight.rows..rows.end * weight.rows], weight.rows))
            .collect();
        run(kernels, &projections, &operands, |index| &outputs[index], Output::Set, pool);
    }
}

/// Some rows of x with an update of their own; each at most once.
pub(crate) struct UpdatedRows<'a> {
    pub(crate) update: &'a PackedLowRank,
    pub(crate) rows: Vec<usize>,
}

/// `y += scaling · B (A x)` for the rows of each update.
///
/// Every update must have the shape of x and y, and no row may have two: the tasks of all updates write y at once.
pub(crate) fn accumulate_updates(
    kernels: &Kernels,
    updates: &[UpdatedRows<'_>],
    x: &[f32],
    y: &SharedRows<'_>,
    pool: &ThreadPool,
) {
    let (mut operands, mut projections) = (Vec::new(), Vec::new());
    for UpdatedRows { update, rows } in updates {
        let Some(PackedFactors { a, b }) = &update.factors else { continue };
        for rows in rows.chunks(ROWS_AT_ONCE) {
            let columns = a.columns();
            let gathered: Vec<f32>;
            let x = if rows.is_sorted_by(|row, next| row + 1 == *next) {
                &x[rows[0] * columns..][..rows.len() * columns]
            } else {
                gathered = rows.iter().flat_map(|row| &x[row * columns..(row + 1) * columns]).copied().collect();
                &gathered
            };
            let mut projection = Projection::of_update(a, update.scaling, kernels, x, pool);
            projection.feed(operands.len());
            projections.push(projection);
            operands.push(Operands::awaiting(kernels, b, rows.len(), Some(rows.to_vec())));
        }
    }
    run(kernels, &projections, &operands, |_| y, Output::Add, pool);
}

/// The tasks of some products in one call of the pool: first those with every A, for which the others wait where they
/// come to need them.
fn run<'y>(
    kernels: &Kernels,
    projections: &[Projection<'_>],
    operands: &[Operands<'_>],
    output_of: impl Fn(usize) -> &'y SharedRows<'y> + Sync + Send,
    output: Output,
    pool: &ThreadPool,
) {
    let mut tasks = Vec::new();
    for projection in projections {
        tasks.extend((0..projection.tasks()).map(|task| Task::Project(projection, task)));
    }
    for (index, operands) in operands.iter().enumerate() {
        let count = operands.tasks(operands.units(kernels), TASK_BYTES, 1);
        tasks.extend((0..count).map(|task| Task::Multiply { index, task, count }));
    }
    pool.for_each(tasks.len(), |index| match tasks[index] {
        Task::Project(projection, task) => projection.run(kernels, task, operands, pool),
        Task::Multiply { index, task, count } => {
            operands[index].run(kernels, task, count, output_of(index), output);
        }
    });
}

/// A part of a call.
enum Task<'a> {
    /// A task of a projection.
    Project(&'a Projection<'a>, usize),
    /// One of so many tasks of a product.
    Multiply { index: usize, task: usize, count: usize },
}
