use kintsugi_linalg::{MatrixView, ThinQr, UpperCholesky, combine_rows, product, solve_transposed_upper, transposed};
use kintsugi_runtime::{Result, ThreadPool};

/// Least square of a pivot, relative to the square of its row, up to which the Gram matrix is trusted: the rows then
/// stand further from each other than the squared rounding error by six digits.
const LEAST_PIVOT: f64 = 1e-12;

/// An orthonormal basis of what the rows of one side span: `F = C Qᵀ` with rows of F `[units, width]`, coordinates C
/// `[units, dimension]` and orthonormal Q `[width, dimension]`.
///
/// Where there are as many units as the side is wide, Q is the identity. Else C is the Cholesky factor of the Gram
/// matrix, and Q is never formed; where the rows are too close to dependent for that, both come from a QR
/// decomposition.
#[derive(Debug)]
pub(crate) struct SideBasis<'a> {
    rows: &'a [f32],
    units: usize,
    width: usize,
    pub(crate) dimension: usize,
    /// `[units, dimension]`.
    pub(crate) coordinates: Vec<f64>,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Whole,
    Cholesky,
    /// Q, `[width, dimension]`.
    Orthonormal(Vec<f64>),
}

impl<'a> SideBasis<'a> {
    /// The basis of `rows` (`[units, width]`), whose Gram matrix is `gram`.
    pub(crate) fn new(rows: &'a [f32], units: usize, width: usize, gram: &[f64], pool: &ThreadPool) -> Result<Self> {
        let wide = || -> Vec<f64> { rows.iter().map(|&value| f64::from(value)).collect() };
        if units >= width {
            return Ok(SideBasis { rows, units, width, dimension: width, coordinates: wide(), kind: Kind::Whole });
        }
        let fill = |i: usize, row: &mut [f64]| row.copy_from_slice(&gram[i * units + i..(i + 1) * units]);
        if let Ok(cholesky) = UpperCholesky::new(units, 0.0, fill, pool)
            && cholesky.damping == 0.0
            && (0..units).all(|i| cholesky.factor.at(i, i).powi(2) > LEAST_PIVOT * gram[i * (units + 1)])
        {
            let mut coordinates = vec![0.0; units * units];
            (0..units)
                .for_each(|i| coordinates[i * units + i..(i + 1) * units].copy_from_slice(cholesky.factor.row(i)));
            return Ok(SideBasis { rows, units, width, dimension: units, coordinates, kind: Kind::Cholesky });
        }
        let turned: Vec<f64> = transposed(&wide(), units, width);
        let ThinQr { q, r } = ThinQr::new(&turned, width, units);
        let coordinates = transposed(&r, units, units);
        Ok(SideBasis { rows, units, width, dimension: units, coordinates, kind: Kind::Orthonormal(q) })
    }

    /// Length of a row.
    pub(crate) fn width(&self) -> usize {
        self.width
    }

    /// `W Qᵀ`: the rows of the side with the coordinates `w`, `[count, dimension]`.
    pub(crate) fn lift(&self, w: &[f64], count: usize, pool: &ThreadPool) -> Vec<f64> {
        match &self.kind {
            Kind::Whole => w.to_vec(),
            Kind::Cholesky => {
                // F = R Qᵀ, so W Qᵀ = (W R⁻¹) F.
                let mut turned = transposed(w, count, self.units);
                solve_transposed_upper(&self.coordinates, self.units, &mut turned, count);
                combine_rows(&transposed(&turned, self.units, count), count, self.rows, self.units, self.width, pool)
            }
            Kind::Orthonormal(q) => {
                let mut out = vec![0.0; count * self.width];
                let q = MatrixView::new(q, self.width, self.dimension);
                product(MatrixView::new(w, count, self.dimension), q.transposed(), &mut out, pool);
                out
            }
        }
    }
}
