use crate::LinearWeight;

/// `y = W x + B (A x) + bias` for each of the rows of `x`, every sum in f64: the oracle of every kernel.
///
/// `x` is `[count, inFeatures]`; the result is `[count, outFeatures]`.
///
/// # Panics
/// When the length of `x` is not a multiple of `inFeatures`.
pub fn reference_product(weight: &LinearWeight, x: &[f32]) -> Vec<f64> {
    let (rows, columns) = (weight.matrix.rows(), weight.matrix.columns());
    assert_eq!(x.len() % columns.max(1), 0, "x is [count, inFeatures]");
    let count = x.len() / columns.max(1);
    let mut out = vec![0.0; count * rows];
    let mut values = vec![0.0f32; columns];
    for row in 0..rows {
        weight.matrix.row_to_f32(row, &mut values);
        let bias = weight.bias.as_ref().map_or(0.0, |bias| f64::from(bias[row]));
        for (i, x) in x.chunks_exact(columns).enumerate() {
            out[i * rows + row] = bias + dot(&values, x);
        }
    }
    if let Some(factors) = &weight.low_rank {
        let rank = factors.rank();
        for (i, x) in x.chunks_exact(columns).enumerate() {
            let projected: Vec<f64> = factors.a().chunks_exact(columns).map(|a| dot(a, x)).collect();
            for row in 0..rows {
                let b = &factors.b()[row * rank..(row + 1) * rank];
                out[i * rows + row] += b.iter().zip(&projected).map(|(&b, t)| f64::from(b) * t).sum::<f64>();
            }
        }
    }
    out
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DenseMatrix, ElementType, LowRank, WeightMatrix};

    #[test]
    fn every_part_of_the_sum_is_there() {
        let matrix = WeightMatrix::Dense(DenseMatrix::from_f32(2, 3, vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0]));
        let low_rank = LowRank::new(2, 3, 1, vec![1.0, -1.0], vec![1.0, 1.0, 1.0], ElementType::F32);
        let weight = LinearWeight { matrix, bias: Some(vec![10.0, 20.0]), low_rank: Some(low_rank) };
        let y = reference_product(&weight, &[1.0, 0.0, 0.0, 1.0, 1.0, 1.0]);
        assert_eq!(y, [12.0, 23.0, 19.0, 32.0]);
    }
}
