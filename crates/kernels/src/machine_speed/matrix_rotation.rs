use std::hint::black_box;
use std::time::Instant;

use kintsugi_runtime::ThreadPool;

use crate::{Kernels, PackedMatrix};

/// Copies of a matrix that products take in turn. Together they are larger than the caches, so that each product finds
/// its matrix in memory, as the Linears of a model are found there token after token.
pub struct MatrixRotation {
    matrices: Vec<PackedMatrix>,
}

impl MatrixRotation {
    /// `count` copies.
    ///
    /// # Panics
    /// When there is not one.
    pub fn new(matrix: PackedMatrix, count: usize) -> Self {
        assert!(count > 0, "a rotation has a matrix");
        MatrixRotation { matrices: vec![matrix; count] }
    }

    /// As many copies as have that many bytes together.
    pub fn of_bytes(matrix: PackedMatrix, bytes: usize) -> Self {
        let count = bytes.div_ceil(matrix.memory_bytes()).max(1);
        MatrixRotation::new(matrix, count)
    }

    /// One of the copies.
    pub fn matrix(&self) -> &PackedMatrix {
        &self.matrices[0]
    }

    /// Number of copies.
    pub fn count(&self) -> usize {
        self.matrices.len()
    }

    /// Seconds that one product takes in the mean when each copy is multiplied once; `x` and `y` as in
    /// [`Kernels::product`].
    pub fn seconds(&self, kernels: &Kernels, x: &[f32], y: &mut [f32], pool: &ThreadPool) -> f64 {
        let start = Instant::now();
        for matrix in &self.matrices {
            kernels.product(matrix, x, y, pool);
        }
        black_box(&y);
        start.elapsed().as_secs_f64() / self.count() as f64
    }

    /// Seconds of one product, with one copy after another in each `turn`.
    pub fn seconds_of_one(&self, turn: usize, kernels: &Kernels, x: &[f32], y: &mut [f32], pool: &ThreadPool) -> f64 {
        let start = Instant::now();
        kernels.product(&self.matrices[turn % self.count()], x, y, pool);
        black_box(&y);
        start.elapsed().as_secs_f64()
    }
}
