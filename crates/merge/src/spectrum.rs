use kintsugi_linalg::{
    BalancedFactors, LeadingDirections, MatrixView, SymmetricEigen, product, symmetric_product, transposed,
};
use kintsugi_runtime::{Result, ThreadPool};

use crate::side_basis::SideBasis;
use crate::{FactorUpdate, UnitStack};

/// A sum of units in orthonormal coordinates of both sides: `T = Q_B M Q_Aᵀ`, where the core M is no larger than the
/// number of units. What a rotation of either side does not change (singular values, truncation) is found in M.
#[derive(Debug)]
pub(crate) struct Spectrum<'a> {
    left: SideBasis<'a>,
    right: SideBasis<'a>,
    /// M, or Mᵀ where `turned`: `[rows, columns]` with no more rows than columns.
    pub(crate) core: Vec<f64>,
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    turned: bool,
}

impl<'a> Spectrum<'a> {
    /// The core of the weighted sum of `stack`.
    pub(crate) fn new(stack: &'a UnitStack, pool: &ThreadPool) -> Result<Self> {
        let units = stack.units();
        let left = SideBasis::new(&stack.b, units, stack.out_features, stack.gram_b(pool), pool)?;
        let right = SideBasis::new(&stack.a, units, stack.in_features, stack.gram_a(pool), pool)?;
        let (p, q) = (left.dimension, right.dimension);
        let weighted: Vec<f64> = left
            .coordinates
            .chunks_exact(p.max(1))
            .zip(&stack.coefficients)
            .flat_map(|(row, coefficient)| row.iter().map(move |value| value * coefficient))
            .collect();
        let (b, a) = (MatrixView::new(&weighted, units, p), MatrixView::new(&right.coordinates, units, q));
        let turned = p > q;
        let mut core = vec![0.0; p * q];
        if turned {
            product(a.transposed(), b, &mut core, pool);
        } else {
            product(b.transposed(), a, &mut core, pool);
        }
        Ok(Spectrum { left, right, core, rows: p.min(q), columns: p.max(q), turned })
    }

    /// The update with these factors of the core.
    pub(crate) fn lift(&self, factors: BalancedFactors, pool: &ThreadPool) -> FactorUpdate {
        let BalancedFactors { rank, left, right } = factors;
        let (left, right) = if self.turned { (right, left) } else { (left, right) };
        FactorUpdate {
            out_features: self.left.width(),
            in_features: self.right.width(),
            b: self.left.lift(&left, rank, pool),
            a: self.right.lift(&right, rank, pool),
        }
    }

    /// All singular values of the sum.
    pub(crate) fn directions(&self, pool: &ThreadPool) -> Result<LeadingDirections<'_>> {
        LeadingDirections::new(&self.core, self.rows, self.columns, pool)
    }
}

/// The number of eigenvectors of a Gram matrix `[n, n]` whose eigenvalues are not negligible, and these as rows.
pub(crate) fn principal_axes(gram: &[f64], n: usize) -> Result<(usize, Vec<f64>)> {
    let eigen = SymmetricEigen::new(gram, n)?;
    let noise = eigen.values.first().copied().unwrap_or(0.0) * 1e-14;
    let kept = eigen.values.iter().take_while(|&&value| value > noise).count();
    Ok((kept, eigen.vectors[..kept * n].to_vec()))
}

/// `C Eᵀ`: coordinates `[units, n]` along the axes `[kept, n]`.
pub(crate) fn along(
    coordinates: &[f64],
    units: usize,
    n: usize,
    axes: &[f64],
    kept: usize,
    pool: &ThreadPool,
) -> Vec<f64> {
    let mut out = vec![0.0; units * kept];
    let axes = MatrixView::new(axes, kept, n);
    product(MatrixView::new(coordinates, units, n), axes.transposed(), &mut out, pool);
    out
}

/// `Cᵀ K C` for coordinates `[units, n]` and a symmetric K `[units, units]`.
pub(crate) fn congruence(coordinates: &[f64], units: usize, n: usize, k: &[f64], pool: &ThreadPool) -> Vec<f64> {
    let c = MatrixView::new(coordinates, units, n);
    let mut weighted = vec![0.0; units * n];
    product(MatrixView::new(k, units, units), c, &mut weighted, pool);
    let weighted = transposed(&weighted, units, n);
    let mut out = vec![0.0; n * n];
    symmetric_product(MatrixView::new(&weighted, n, units), c, &mut out, pool);
    out
}
