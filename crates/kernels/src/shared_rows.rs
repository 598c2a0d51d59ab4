use std::marker::PhantomData;
use std::ops::Range;

/// A row-major matrix that several tasks write at once, each its own columns or rows.
pub(crate) struct SharedRows<'a> {
    values: *mut f32,
    rows: usize,
    width: usize,
    borrow: PhantomData<&'a mut [f32]>,
}

// SAFETY: the only access is `slice`, whose caller promises that no two live slices overlap; f32 may be written from
// any thread.
unsafe impl Sync for SharedRows<'_> {}

impl<'a> SharedRows<'a> {
    /// Shares `values`, rows of `width`, for as long as they are borrowed.
    pub(crate) fn new(values: &'a mut [f32], width: usize) -> Self {
        let rows = values.len() / width.max(1);
        SharedRows { values: values.as_mut_ptr(), rows, width, borrow: PhantomData }
    }

    /// Some columns of a row.
    ///
    /// # Safety
    /// No other slice that overlaps this one may be alive, on any thread.
    #[expect(clippy::mut_from_ref, reason = "handing out disjoint parts of one borrow is what this type is for")]
    pub(crate) unsafe fn slice(&self, row: usize, columns: Range<usize>) -> &mut [f32] {
        assert!(row < self.rows && columns.start <= columns.end && columns.end <= self.width, "outside of the matrix");
        // SAFETY: inside of the borrowed slice by the check above; not aliased as the caller promises.
        unsafe { std::slice::from_raw_parts_mut(self.values.add(row * self.width + columns.start), columns.len()) }
    }
}
