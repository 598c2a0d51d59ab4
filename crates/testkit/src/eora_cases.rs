//! Residuals and activations that low-rank compensation must master, and f64 oracles for them and for GPTQ.

use kintsugi_weights::{CodeTable, DenseMatrix, ElementType, GroupSize, QuantizedMatrix, QuantizedParts};

/// How the inputs of a Linear are distributed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Inputs {
    /// Independent channels of equal size.
    White,
    /// Principal components that fall like `i^-p`, mixed over all channels.
    PowerLaw(f64),
    /// A power law, and every 37th channel times the factor: what massive activations look like.
    Outliers(f64),
    /// A power law around a mean that is twenty times as large as the rest.
    Mean,
}

/// What compression left behind.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Damage {
    /// Every weight rounded to its nearest grid point at that many bits.
    Rounded(u8),
    /// Column by column with error feedback, as GPTQ leaves it.
    Feedback(u8),
    /// A residual of exactly that many directions.
    LowRank(usize),
    /// The smaller two of every four weights removed.
    TwoOfFour,
    /// Every weight rounded to the nearest four-bit float of its group.
    Float4,
}

/// One row of the table: a Linear of `rows × columns`, `tokens` inputs, and the rank to repair it with.
#[derive(Clone, Copy, Debug)]
pub struct EoraCase {
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub columns: usize,
    /// Calibration vectors.
    pub tokens: usize,
    /// Rank asked for.
    pub rank: usize,
    /// Distribution of the inputs.
    pub inputs: Inputs,
    /// Channels, from channel 3 on in steps of five, that are zero in every input.
    pub dead: usize,
    /// Kind of residual.
    pub damage: Damage,
}

const fn case(
    shape: (usize, usize),
    tokens: usize,
    rank: usize,
    inputs: Inputs,
    dead: usize,
    damage: Damage,
) -> EoraCase {
    EoraCase { rows: shape.0, columns: shape.1, tokens, rank, inputs, dead, damage }
}

/// Shapes (square, wide, tall, single row, single column) × spectra × residuals × ranks, including dead channels, fewer
/// tokens than the rank, ranks above either side, and channels that are 10⁵ times the others.
pub const EORA_CASES: &[EoraCase] = {
    use Damage::{Feedback, LowRank, Rounded, TwoOfFour};
    use Inputs::{Mean, Outliers, PowerLaw, White};
    &[
        case((96, 96), 600, 16, White, 0, Rounded(2)),
        case((96, 96), 600, 16, White, 0, Rounded(4)),
        case((96, 96), 600, 16, PowerLaw(0.5), 0, Rounded(3)),
        case((96, 96), 600, 16, PowerLaw(0.5), 0, Feedback(2)),
        case((96, 96), 600, 16, PowerLaw(0.5), 0, Feedback(3)),
        case((96, 96), 600, 16, PowerLaw(0.5), 0, Feedback(4)),
        case((96, 96), 600, 16, PowerLaw(1.5), 0, Rounded(2)),
        case((96, 96), 600, 16, PowerLaw(1.5), 0, Feedback(3)),
        case((96, 96), 600, 1, PowerLaw(1.0), 0, Feedback(4)),
        case((96, 96), 600, 95, PowerLaw(0.5), 0, Feedback(3)),
        case((96, 96), 600, 96, PowerLaw(0.5), 0, Rounded(2)),
        case((64, 160), 700, 12, PowerLaw(0.8), 0, Rounded(3)),
        case((64, 160), 700, 12, PowerLaw(0.8), 0, Feedback(2)),
        case((64, 160), 700, 12, Outliers(30.0), 0, Feedback(3)),
        case((160, 64), 700, 12, PowerLaw(0.8), 0, Rounded(3)),
        case((160, 64), 700, 12, PowerLaw(0.8), 0, Feedback(2)),
        case((160, 64), 700, 12, Outliers(30.0), 0, Feedback(4)),
        case((160, 64), 700, 100, PowerLaw(0.8), 0, Rounded(2)),
        case((96, 96), 600, 16, Mean, 0, Rounded(2)),
        case((96, 96), 600, 16, Mean, 0, Feedback(3)),
        case((96, 96), 600, 16, Outliers(300.0), 0, Feedback(4)),
        case((96, 96), 600, 8, Outliers(1e5), 0, Rounded(2)),
        case((96, 96), 600, 8, Outliers(1e5), 0, Feedback(3)),
        case((48, 130), 600, 8, Outliers(1e5), 6, Feedback(2)),
        case((130, 48), 600, 8, Outliers(1e5), 6, Rounded(4)),
        case((96, 96), 600, 16, PowerLaw(0.5), 8, Rounded(3)),
        case((96, 96), 600, 16, PowerLaw(0.5), 8, Feedback(2)),
        case((96, 96), 600, 16, White, 19, TwoOfFour),
        case((96, 128), 9, 16, PowerLaw(0.5), 0, Rounded(3)),
        case((96, 128), 40, 8, PowerLaw(0.5), 0, Feedback(3)),
        case((128, 96), 9, 16, PowerLaw(0.5), 4, Feedback(2)),
        case((6, 120), 500, 16, PowerLaw(0.8), 0, Feedback(3)),
        case((120, 6), 500, 16, PowerLaw(0.8), 0, Rounded(2)),
        case((1, 64), 300, 4, PowerLaw(0.5), 0, Rounded(2)),
        case((64, 1), 300, 4, White, 0, Rounded(2)),
        case((1, 1), 5, 1, White, 0, Rounded(2)),
        case((96, 96), 600, 8, PowerLaw(0.5), 0, LowRank(5)),
        case((96, 96), 600, 8, PowerLaw(0.5), 0, LowRank(8)),
        case((130, 64), 600, 4, Outliers(300.0), 0, LowRank(9)),
        case((64, 130), 1200, 20, PowerLaw(1.0), 3, TwoOfFour),
    ]
};

/// Cases that are large enough for a solver that iterates: every kind of residual × spectra × shapes × ranks.
pub const ITERATED_EORA_CASES: &[EoraCase] = {
    use Damage::{Feedback, Float4, LowRank, Rounded, TwoOfFour};
    use Inputs::{Mean, Outliers, PowerLaw, White};
    &[
        case((136, 136), 400, 8, White, 0, Rounded(2)),
        case((136, 136), 400, 8, White, 0, Feedback(3)),
        case((136, 136), 400, 8, White, 0, TwoOfFour),
        case((136, 136), 400, 8, White, 0, Float4),
        case((136, 136), 400, 1, PowerLaw(0.5), 0, Rounded(3)),
        case((136, 136), 400, 4, PowerLaw(0.5), 0, Feedback(2)),
        case((136, 136), 400, 8, PowerLaw(0.5), 0, Feedback(4)),
        case((136, 136), 400, 8, PowerLaw(0.5), 9, TwoOfFour),
        case((136, 136), 400, 8, PowerLaw(1.0), 0, Rounded(4)),
        case((136, 136), 400, 8, PowerLaw(1.0), 0, Feedback(2)),
        case((136, 136), 400, 3, PowerLaw(1.0), 0, Float4),
        case((136, 136), 400, 8, PowerLaw(1.5), 0, Rounded(2)),
        case((136, 136), 400, 8, PowerLaw(1.5), 0, Feedback(3)),
        case((136, 136), 400, 8, PowerLaw(1.5), 0, TwoOfFour),
        case((136, 200), 500, 8, Outliers(30.0), 0, Rounded(3)),
        case((136, 200), 500, 8, Outliers(30.0), 0, Feedback(4)),
        case((136, 200), 500, 8, Outliers(30.0), 0, Float4),
        case((136, 200), 500, 8, Outliers(300.0), 0, Feedback(2)),
        case((136, 200), 500, 4, Outliers(300.0), 12, TwoOfFour),
        case((136, 200), 500, 8, Outliers(1e5), 0, Rounded(2)),
        case((136, 200), 500, 4, Outliers(1e5), 6, Feedback(3)),
        case((200, 136), 400, 8, Outliers(1e5), 0, Float4),
        case((200, 136), 400, 8, Outliers(300.0), 0, Rounded(4)),
        case((200, 136), 400, 8, Mean, 0, Rounded(2)),
        case((200, 136), 400, 8, Mean, 0, Feedback(3)),
        case((200, 136), 400, 8, PowerLaw(0.8), 0, TwoOfFour),
        case((200, 136), 400, 2, PowerLaw(0.8), 5, Feedback(4)),
        case((136, 200), 9, 8, PowerLaw(0.5), 0, Rounded(3)),
        case((136, 200), 5, 8, PowerLaw(0.5), 0, Feedback(3)),
        case((136, 136), 40, 8, PowerLaw(0.5), 0, Feedback(2)),
        case((136, 136), 400, 8, PowerLaw(0.5), 0, LowRank(5)),
        case((136, 136), 400, 8, PowerLaw(0.5), 0, LowRank(8)),
        case((200, 136), 400, 4, Outliers(300.0), 0, LowRank(20)),
        case((136, 200), 500, 8, PowerLaw(1.0), 3, LowRank(60)),
        // Wide enough for energies and directions in f32, and with so little left that they are not.
        case((136, 520), 600, 8, PowerLaw(0.5), 0, Rounded(3)),
        case((136, 520), 600, 8, Outliers(300.0), 0, Float4),
        case((136, 520), 600, 4, Mean, 0, TwoOfFour),
        case((136, 520), 300, 8, PowerLaw(0.5), 0, LowRank(8)),
    ]
};

/// The matrices of a case.
#[derive(Clone, Debug)]
pub struct EoraInstance {
    /// Original weight, `[rows, columns]`.
    pub weight: DenseMatrix,
    /// Compressed weight.
    pub quantized: QuantizedMatrix,
    /// Calibration inputs, `[tokens, columns]`.
    pub inputs: Vec<f32>,
}

impl EoraCase {
    /// Makes the matrices; the same ones every time.
    pub fn instance(&self) -> EoraInstance {
        let mut random = Random::new(self.rows * 31 + self.columns * 7 + self.tokens + self.rank);
        let inputs = self.make_inputs(&mut random);
        let (rows, columns) = (self.rows, self.columns);
        let weight: Vec<f32> = match self.damage {
            Damage::LowRank(rank) => {
                // Factors on a coarse binary grid: their product is exact in f32, so it has no further directions.
                let mut coarse = |count| random.normals(count).into_iter().map(|z| (z * 8.0).round() / 64.0);
                let left: Vec<f64> = coarse(rows * rank).collect();
                let right: Vec<f64> = coarse(rank * columns).collect();
                let at = |row: usize, column: usize| -> f64 {
                    (0..rank).map(|l| left[row * rank + l] * right[l * columns + column]).sum()
                };
                (0..rows * columns).map(|i| at(i / columns, i % columns) as f32).collect()
            }
            _ => random.normals(rows * columns).into_iter().map(|value| value as f32 * 0.05).collect(),
        };
        let quantized = match self.damage {
            Damage::Rounded(bits) => round_to_grids(&weight, rows, columns, bits, |_, _, value| value),
            Damage::Feedback(bits) => {
                let hessian = damped_second_moment(&inputs, columns, 0.01);
                feedback(&weight, rows, columns, bits, &hessian)
            }
            Damage::LowRank(_) => exact_copy_of_zero(rows, columns),
            Damage::Float4 => round_to_float4(&weight, rows, columns),
            Damage::TwoOfFour => round_to_grids(&two_of_four(&weight), rows, columns, 8, |_, _, value| value),
        };
        EoraInstance { weight: DenseMatrix::from_f32(rows, columns, weight), quantized, inputs }
    }

    fn make_inputs(&self, random: &mut Random) -> Vec<f32> {
        let k = self.columns;
        let power = match self.inputs {
            Inputs::White => 0.0,
            Inputs::PowerLaw(power) => power,
            Inputs::Outliers(_) | Inputs::Mean => 0.7,
        };
        let spectrum: Vec<f64> = (0..k).map(|i| ((i + 1) as f64).powf(-power)).collect();
        let reflections: Vec<Vec<f64>> = (0..3).map(|_| unit(random.normals(k))).collect();
        let mean: Vec<f64> = random.normals(k).into_iter().map(|value| value * 20.0).collect();
        let mut inputs = Vec::with_capacity(self.tokens * k);
        for _ in 0..self.tokens {
            let mut x: Vec<f64> = random.normals(k).iter().zip(&spectrum).map(|(z, s)| z * s).collect();
            if power > 0.0 {
                for v in &reflections {
                    let dot: f64 = v.iter().zip(&x).map(|(v, x)| v * x).sum();
                    x.iter_mut().zip(v).for_each(|(x, v)| *x -= 2.0 * dot * v);
                }
            }
            for (j, x) in x.iter_mut().enumerate() {
                match self.inputs {
                    Inputs::Outliers(factor) if j % 37 == 2 => *x *= factor,
                    Inputs::Mean => *x += mean[j],
                    _ => {}
                }
                if j % 5 == 3 && j / 5 < self.dead {
                    *x = 0.0;
                }
            }
            inputs.extend(x.into_iter().map(|x| x as f32));
        }
        inputs
    }
}

/// Pseudo-random numbers that are the same on every machine (SplitMix64).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// A sequence of its own for each seed.
    pub fn new(seed: usize) -> Self {
        Random(seed as u64 ^ 0x5851_f42d_4c95_7f2d)
    }

    /// Uniform in [0, 1).
    pub fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Standard normal (Box–Muller).
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }

    /// `count` standard normals.
    pub fn normals(&mut self, count: usize) -> Vec<f64> {
        (0..count).map(|_| self.normal()).collect()
    }
}

/// `Xᵀ X + damping · mean(diag) · I` in f64 for rows of `columns`; a dead channel gets the mean on its diagonal.
pub fn damped_second_moment(inputs: &[f32], columns: usize, damping: f64) -> Vec<f64> {
    let mut sum = vec![0.0; columns * columns];
    for x in inputs.chunks_exact(columns) {
        for i in 0..columns {
            for j in 0..columns {
                sum[i * columns + j] += f64::from(x[i]) * f64::from(x[j]);
            }
        }
    }
    let diagonal: Vec<f64> = (0..columns).map(|i| sum[i * (columns + 1)]).collect();
    let live = diagonal.iter().filter(|&&value| value > 0.0).count().max(1);
    let mean = diagonal.iter().sum::<f64>() / live as f64;
    for (i, &value) in diagonal.iter().enumerate() {
        sum[i * (columns + 1)] += damping * mean + if value == 0.0 { mean } else { 0.0 };
    }
    sum
}

/// Optimal-brain rounding as first published, with the explicit inverse of `hessian` and its downdate after every
/// column: the oracle of GPTQ. `round(row, column, weight)` is the grid. Returns the rounded matrix.
///
/// # Panics
/// When the Hessian is singular.
pub fn optimal_brain_round(
    weight: &[f64],
    columns: usize,
    hessian: &[f64],
    mut round: impl FnMut(usize, usize, f64) -> f64,
) -> Vec<f64> {
    let mut weight = weight.to_vec();
    let mut inverse = invert(hessian, columns);
    for j in 0..columns {
        let pivot = inverse[j * (columns + 1)];
        let coupling: Vec<f64> = inverse[j * columns..(j + 1) * columns].to_vec();
        for (row, weight) in weight.chunks_exact_mut(columns).enumerate() {
            let rounded = round(row, j, weight[j]);
            let error = (weight[j] - rounded) / pivot;
            for l in j + 1..columns {
                weight[l] -= error * coupling[l];
            }
            weight[j] = rounded;
        }
        for i in j + 1..columns {
            let factor = inverse[i * columns + j] / pivot;
            for l in j + 1..columns {
                inverse[i * columns + l] -= factor * coupling[l];
            }
        }
    }
    weight
}

/// Singular values of a row-major `[rows, columns]` matrix, descending, by one-sided Jacobi rotations: accurate to
/// rounding of each value, not only of the largest.
pub fn singular_values(matrix: &[f64], rows: usize, columns: usize) -> Vec<f64> {
    let mut vectors: Vec<Vec<f64>> = if rows <= columns {
        matrix.chunks_exact(columns.max(1)).map(<[f64]>::to_vec).collect()
    } else {
        (0..columns).map(|j| matrix.iter().skip(j).step_by(columns).copied().collect()).collect()
    };
    for _ in 0..60 {
        let mut rotated = false;
        for i in 0..vectors.len() {
            for j in i + 1..vectors.len() {
                let (head, tail) = vectors.split_at_mut(j);
                let (x, y) = (&mut head[i], &mut tail[0]);
                let (xx, yy, xy) = (dot(x, x), dot(y, y), dot(x, y));
                if xy.abs() <= 1e-15 * (xx * yy).sqrt() {
                    continue;
                }
                rotated = true;
                let zeta = (yy - xx) / (2.0 * xy);
                let tangent = zeta.signum() / (zeta.abs() + zeta.hypot(1.0));
                let cosine = 1.0 / tangent.hypot(1.0);
                let sine = cosine * tangent;
                for (x, y) in x.iter_mut().zip(y.iter_mut()) {
                    (*x, *y) = (cosine * *x - sine * *y, sine * *x + cosine * *y);
                }
            }
        }
        if !rotated {
            break;
        }
    }
    let mut values: Vec<f64> = vectors.iter().map(|v| dot(v, v).sqrt()).collect();
    values.sort_by(|a, b| b.total_cmp(a));
    values
}

/// `M x` for every row x of `inputs`: row-major `[rows of M, count]` in f64.
pub fn outputs(matrix: &[f64], columns: usize, inputs: &[f32]) -> Vec<f64> {
    let wide: Vec<f64> = inputs.iter().map(|&value| f64::from(value)).collect();
    let rows = matrix.chunks_exact(columns);
    rows.flat_map(|row| wide.chunks_exact(columns).map(move |x| dot(row, x))).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn unit(v: Vec<f64>) -> Vec<f64> {
    let norm = dot(&v, &v).sqrt();
    v.into_iter().map(|value| value / norm).collect()
}

/// Gauss–Jordan with partial pivoting.
fn invert(matrix: &[f64], n: usize) -> Vec<f64> {
    let mut left = matrix.to_vec();
    let mut right: Vec<f64> = (0..n * n).map(|i| f64::from(u8::from(i % (n + 1) == 0))).collect();
    for column in 0..n {
        let size = |row: usize| left[row * n + column].abs();
        let pivot = (column..n).max_by(|&a, &b| size(a).total_cmp(&size(b))).unwrap();
        assert!(left[pivot * n + column] != 0.0, "a singular matrix has no inverse");
        for j in 0..n {
            left.swap(pivot * n + j, column * n + j);
            right.swap(pivot * n + j, column * n + j);
        }
        let scale = left[column * (n + 1)];
        for row in 0..n {
            let factor = left[row * n + column] / scale;
            for j in 0..n {
                if row != column {
                    left[row * n + j] -= factor * left[column * n + j];
                    right[row * n + j] -= factor * right[column * n + j];
                }
            }
        }
        for j in 0..n {
            left[column * n + j] /= scale;
            right[column * n + j] /= scale;
        }
    }
    right
}

const GROUP: usize = 32;

/// Asymmetric min/max grids over groups of 32 columns with f32 scales, fitted to `weight`; each code is the one nearest
/// to `value(row, column, weight)`.
fn round_to_grids(
    weight: &[f32],
    rows: usize,
    columns: usize,
    bits: u8,
    mut value: impl FnMut(usize, usize, f64) -> f64,
) -> QuantizedMatrix {
    let largest = f64::from((1u16 << bits) - 1);
    let (mut codes, mut scales, mut zero_points) = (Vec::new(), Vec::new(), Vec::new());
    for (row, weights) in weight.chunks_exact(columns).enumerate() {
        for (group, weights) in weights.chunks(GROUP).enumerate() {
            let low = weights.iter().fold(0.0f32, |low, &w| low.min(w));
            let high = weights.iter().fold(0.0f32, |high, &w| high.max(w));
            let scale = if high > low { f64::from(high - low) / largest } else { 1.0 } as f32;
            let zero = (f64::from(-low) / f64::from(scale)).round().clamp(0.0, largest);
            for (i, &weight) in weights.iter().enumerate() {
                let steps = (value(row, group * GROUP + i, f64::from(weight)) / f64::from(scale)).round();
                codes.push((steps + zero).clamp(0.0, largest) as u8);
            }
            scales.push(scale);
            zero_points.push(zero as u8);
        }
    }
    QuantizedMatrix::new(QuantizedParts {
        rows,
        columns,
        bits,
        group_size: GroupSize::Columns(GROUP),
        codes,
        scales,
        scale_type: ElementType::F32,
        zero_points: Some(zero_points),
        ..QuantizedParts::default()
    })
    .expect("the parts are made to fit")
}

fn feedback(weight: &[f32], rows: usize, columns: usize, bits: u8, hessian: &[f64]) -> QuantizedMatrix {
    let grids = round_to_grids(weight, rows, columns, bits, |_, _, value| value);
    let wide: Vec<f64> = weight.iter().map(|&value| f64::from(value)).collect();
    let rounded = optimal_brain_round(&wide, columns, hessian, |row, column, value| {
        let group = grids.group_of(column);
        let scale = f64::from(grids.scales()[row * grids.groups() + group]);
        let zero = f64::from(grids.zero_point(row * grids.groups() + group));
        let largest = f64::from((1u16 << bits) - 1);
        (((value / scale).round() + zero).clamp(0.0, largest) - zero) * scale
    });
    round_to_grids(weight, rows, columns, bits, |row, column, _| rounded[row * columns + column])
}

fn exact_copy_of_zero(rows: usize, columns: usize) -> QuantizedMatrix {
    round_to_grids(&vec![0.0; rows * columns], rows, columns, 2, |_, _, value| value)
}

fn round_to_float4(weight: &[f32], rows: usize, columns: usize) -> QuantizedMatrix {
    let table = CodeTable::FP4;
    let (mut codes, mut scales) = (Vec::new(), Vec::new());
    for weights in weight.chunks_exact(columns) {
        for weights in weights.chunks(GROUP) {
            let largest = weights.iter().fold(0.0f32, |largest, w| largest.max(w.abs()));
            let scale = if largest > 0.0 { largest / 6.0 } else { 1.0 };
            scales.push(scale);
            codes.extend(weights.iter().map(|&weight| {
                let distance = |code: usize| (table.values()[code] * scale - weight).abs();
                (0..16).min_by(|&a, &b| distance(a).total_cmp(&distance(b))).unwrap_or(0) as u8
            }));
        }
    }
    QuantizedMatrix::new(QuantizedParts {
        rows,
        columns,
        bits: 4,
        group_size: GroupSize::Columns(GROUP),
        codes,
        scales,
        scale_type: ElementType::F32,
        code_table: Some(table),
        ..QuantizedParts::default()
    })
    .expect("the parts are made to fit")
}

fn two_of_four(weight: &[f32]) -> Vec<f32> {
    let mut pruned = weight.to_vec();
    for four in pruned.chunks_mut(4) {
        let mut order: Vec<usize> = (0..four.len()).collect();
        order.sort_by(|&i, &j| four[i].abs().total_cmp(&four[j].abs()));
        for &i in order.iter().take(four.len() / 2) {
            four[i] = 0.0;
        }
    }
    pruned
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jacobi_finds_known_singular_values_over_many_magnitudes() {
        // A product of reflections around a diagonal has the singular values of the diagonal.
        let n = 12;
        let expected: Vec<f64> = (0..n).map(|i| 10f64.powi(-(i as i32))).collect();
        let v = unit(Random::new(1).normals(n));
        let reflect = |i: usize, j: usize| f64::from(u8::from(i == j)) - 2.0 * v[i] * v[j];
        let matrix: Vec<f64> = (0..n * n).map(|at| expected[at / n] * reflect(at / n, at % n)).collect();
        for (value, expected) in singular_values(&matrix, n, n).iter().zip(&expected) {
            assert!((value / expected - 1.0).abs() < 1e-12, "{value} {expected}");
        }
        let tall: Vec<f64> = matrix.iter().chain(&matrix).copied().collect();
        for (value, expected) in singular_values(&tall, 2 * n, n).iter().zip(&expected) {
            assert!((value / expected / 2f64.sqrt() - 1.0).abs() < 1e-12);
        }
    }

    #[test]
    fn optimal_brain_rounding_lowers_the_output_error_of_plain_rounding() {
        let case = case((96, 96), 600, 16, Inputs::PowerLaw(1.5), 0, Damage::Feedback(3));
        let plain = EoraCase { damage: Damage::Rounded(3), ..case }.instance();
        let fed_back = case.instance();
        let error = |instance: &EoraInstance| {
            let pairs = instance.weight.to_f32().into_iter().zip(instance.quantized.to_f32());
            let delta: Vec<f64> = pairs.map(|(a, b)| f64::from(a) - f64::from(b)).collect();
            let y = outputs(&delta, case.columns, &instance.inputs);
            dot(&y, &y).sqrt()
        };
        assert!(error(&fed_back) < 0.8 * error(&plain), "{} {}", error(&fed_back), error(&plain));
    }
}
