use crate::{MatrixView, MatrixViewMut, Scalar};

/// Rows of a band: enough to make one band a good operand of a product, few enough that what bands hold below the
/// diagonal is little.
const BAND_ROWS: usize = 256;

/// The upper triangle of a square matrix: of a symmetric matrix all there is to know, of an upper triangular one all
/// that is not zero.
///
/// Rows lie in bands: a band begins at the column of its first row, row-major, so it is a matrix that products can read,
/// and the whole takes `n² / 2 + 128 n` numbers. Each band is an allocation of its own, so that a matrix can be
/// consumed band by band. What bands hold below the diagonal means nothing.
#[derive(Clone, Debug)]
pub struct UpperTriangle<T> {
    side: usize,
    bands: Vec<Vec<T>>,
}

/// Consecutive rows of one band.
pub(crate) struct RowsMut<'a, T> {
    /// Number of the first row.
    pub(crate) first: usize,
    /// Number of the first column.
    pub(crate) column: usize,
    /// Distance between the starts of rows.
    pub(crate) stride: usize,
    pub(crate) values: &'a mut [T],
}

impl<T: Scalar> UpperTriangle<T> {
    /// A matrix of zeros.
    pub fn zeros(side: usize) -> Self {
        let band = |first: usize| vec![T::ZERO; BAND_ROWS.min(side - first) * (side - first)];
        UpperTriangle { side, bands: (0..side).step_by(BAND_ROWS).map(band).collect() }
    }

    /// The upper triangle of a row-major `[side, side]` matrix.
    ///
    /// # Panics
    /// When the number of values is not `side²`.
    pub fn of(values: &[T], side: usize) -> Self {
        assert_eq!(values.len(), side * side, "the matrix is square");
        let mut triangle = Self::zeros(side);
        (0..side).for_each(|i| triangle.row_mut(i).copy_from_slice(&values[i * side + i..(i + 1) * side]));
        triangle
    }

    /// Bytes of a matrix of `side` rows.
    pub fn bytes(side: usize) -> u64 {
        let band = |first: usize| BAND_ROWS.min(side - first) as u64 * (side - first) as u64;
        (0..side).step_by(BAND_ROWS).map(band).sum::<u64>() * size_of::<T>() as u64
    }

    /// Number of rows and of columns.
    pub fn side(&self) -> usize {
        self.side
    }

    /// Row `i` from its diagonal element on.
    pub fn row(&self, i: usize) -> &[T] {
        let (band, range) = self.place(i);
        &self.bands[band][range]
    }

    /// Row `i` from its diagonal element on.
    pub fn row_mut(&mut self, i: usize) -> &mut [T] {
        let (band, range) = self.place(i);
        &mut self.bands[band][range]
    }

    /// Element `(i, j)` of the symmetric matrix, on either side of the diagonal.
    pub fn at(&self, i: usize, j: usize) -> T {
        let (row, column) = (i.min(j), i.max(j));
        let first = row / BAND_ROWS * BAND_ROWS;
        self.bands[row / BAND_ROWS][(row - first) * (self.side - first) + column - first]
    }

    /// The diagonal.
    pub fn diagonal(&self) -> Vec<T> {
        (0..self.side).map(|i| self.row(i)[0]).collect()
    }

    /// The whole symmetric matrix, row-major: for tests and small matrices.
    pub fn to_symmetric(&self) -> Vec<T> {
        (0..self.side).flat_map(|i| (0..self.side).map(move |j| self.at(i, j))).collect()
    }

    /// Number of bands.
    pub(crate) fn bands(&self) -> usize {
        self.bands.len()
    }

    /// The first row of band `index`, which is its first column too, and the band.
    pub(crate) fn band(&self, index: usize) -> (usize, MatrixView<'_, T>) {
        let first = index * BAND_ROWS;
        let width = self.side - first;
        (first, MatrixView::new(&self.bands[index], BAND_ROWS.min(width), width))
    }

    /// The parts of rows `rows` that lie in one band each: the number of the first row of the part, and its columns
    /// `columns`, all of them right of the rows.
    ///
    /// # Panics
    /// When a column lies left of the last row.
    pub fn rectangle(
        &self,
        rows: std::ops::Range<usize>,
        columns: std::ops::Range<usize>,
    ) -> impl Iterator<Item = (usize, MatrixView<'_, T>)> {
        assert!(columns.start + 1 >= rows.end, "the rectangle lies above the diagonal");
        (rows.start / BAND_ROWS..rows.end.div_ceil(BAND_ROWS)).map(move |index| {
            let (first, band) = self.band(index);
            let (from, to) = (rows.start.max(first), rows.end.min(first + BAND_ROWS));
            let part = band.row_range(from - first..to - first);
            (from, part.column_range(columns.start - first..columns.end - first))
        })
    }

    /// Rows in parts of `height`, none of which lies in two bands: `height` divides 256.
    pub(crate) fn parts_mut(&mut self, height: usize) -> Vec<RowsMut<'_, T>> {
        let mut parts = Vec::new();
        for (index, band) in self.bands.iter_mut().enumerate() {
            let column = index * BAND_ROWS;
            let stride = self.side - column;
            for (part, values) in band.chunks_mut(height * stride).enumerate() {
                parts.push(RowsMut { first: column + part * height, column, stride, values });
            }
        }
        parts
    }

    /// The same matrix with elements of another type.
    pub fn map<U: Scalar>(&self, convert: impl Fn(T) -> U) -> UpperTriangle<U> {
        let band = |band: &Vec<T>| band.iter().map(|&value| convert(value)).collect();
        UpperTriangle { side: self.side, bands: self.bands.iter().map(band).collect() }
    }

    /// Makes another matrix of this one, row by row, and frees each band as soon as it was read. `convert` gets the
    /// number of a row, the row from its diagonal element on, and where the new one goes.
    pub fn convert<U: Scalar>(self, mut convert: impl FnMut(usize, &[T], &mut [U])) -> UpperTriangle<U> {
        let side = self.side;
        let band = |(index, band): (usize, Vec<T>)| {
            let first = index * BAND_ROWS;
            let width = side - first;
            let mut out = vec![U::ZERO; band.len()];
            for (row, (from, to)) in band.chunks_exact(width).zip(out.chunks_exact_mut(width)).enumerate() {
                convert(first + row, &from[row..], &mut to[row..]);
            }
            out
        };
        UpperTriangle { side, bands: self.bands.into_iter().enumerate().map(band).collect() }
    }

    fn place(&self, i: usize) -> (usize, std::ops::Range<usize>) {
        assert!(i < self.side, "row {i} of {}", self.side);
        let first = i / BAND_ROWS * BAND_ROWS;
        let width = self.side - first;
        let start = (i - first) * width;
        (i / BAND_ROWS, start + i - first..start + width)
    }
}

impl<T: Scalar> PartialEq for UpperTriangle<T> {
    fn eq(&self, other: &Self) -> bool {
        self.side == other.side && (0..self.side).all(|i| self.row(i) == other.row(i))
    }
}

impl<'a, T: Scalar> RowsMut<'a, T> {
    /// Number of rows.
    pub(crate) fn height(&self) -> usize {
        self.values.len() / self.stride
    }

    /// Some of the columns.
    pub(crate) fn columns(&mut self, range: std::ops::Range<usize>) -> MatrixViewMut<'_, T> {
        let height = self.height();
        let range = range.start - self.column..range.end - self.column;
        MatrixViewMut::new(self.values, height, self.stride).column_range(range)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_are_where_they_belong_over_any_number_of_bands() {
        for side in [0, 1, 5, 255, 256, 257, 700] {
            let values: Vec<f64> = (0..side * side).map(|at| (at % side * (at / side) + at / side) as f64).collect();
            let triangle = UpperTriangle::of(&values, side);
            assert_eq!(triangle.side(), side);
            assert_eq!(triangle.diagonal(), (0..side).map(|i| values[i * (side + 1)]).collect::<Vec<_>>());
            for i in 0..side {
                assert_eq!(triangle.row(i), &values[i * side + i..(i + 1) * side]);
                for j in [i, (i + 300) % side] {
                    assert_eq!(triangle.at(i, j), values[i.min(j) * side + i.max(j)]);
                }
            }
            let stored: usize = triangle.bands.iter().map(Vec::len).sum();
            assert_eq!(UpperTriangle::<f64>::bytes(side), stored as u64 * 8);
            assert!(stored <= side * (side + 256) / 2 + side * 128);
            let halves = triangle.clone().convert(|i, from, to: &mut [f32]| {
                from.iter().zip(to).for_each(|(from, to)| *to = (*from / 2.0) as f32 + i as f32);
            });
            assert!((0..side).all(|i| halves.row(i)[0] == (triangle.row(i)[0] / 2.0) as f32 + i as f32));
        }
    }

    #[test]
    fn rectangles_cover_their_rows() {
        let side = 600;
        let values: Vec<f64> = (0..side * side).map(|at| at as f64).collect();
        let triangle = UpperTriangle::of(&values, side);
        let mut next = 100;
        for (first, part) in triangle.rectangle(100..540, 540..597) {
            assert_eq!((first, part.columns()), (next, 57));
            for row in [0, part.rows() - 1] {
                assert_eq!(part.0[(row, 3)], values[(first + row) * side + 543]);
            }
            next += part.rows();
        }
        assert_eq!(next, 540);
    }

    #[test]
    fn what_lies_below_the_diagonal_means_nothing() {
        let mut one = UpperTriangle::<f64>::zeros(3);
        let two = one.clone();
        one.bands[0][3] = 7.0;
        assert_eq!(one, two);
        one.row_mut(1)[1] = 7.0;
        assert!(one != two);
        assert_eq!((one.at(1, 2), one.at(2, 1)), (7.0, 7.0));
    }
}
