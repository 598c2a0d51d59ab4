use half::bf16;
use kintsugi_runtime::Result;
use kintsugi_weights::{
    DenseMatrix, DenseValues, ElementType, GroupSize, LinearWeight, LowRank, QuantizedMatrix, QuantizedParts,
    WeightMatrix,
};

use crate::Precision;

/// Weights whose products are measured.
pub(super) struct WeightKind {
    /// Width of the codes on a symmetric grid; `None` for plain bf16.
    pub(super) bits: Option<u8>,
    /// Rank of a compensation in bf16; 0 for none.
    pub(super) rank: usize,
    pub(super) precision: Precision,
}

/// What is measured, one line per entry.
pub(super) const WEIGHT_KINDS: [WeightKind; 5] = [
    WeightKind { bits: Some(4), rank: 0, precision: Precision::Fast },
    WeightKind { bits: Some(4), rank: 64, precision: Precision::Fast },
    WeightKind { bits: Some(4), rank: 0, precision: Precision::Exact },
    WeightKind { bits: Some(8), rank: 0, precision: Precision::Fast },
    WeightKind { bits: None, rank: 0, precision: Precision::Exact },
];

/// Columns of a group of codes.
pub(super) const GROUP_COLUMNS: usize = 128;

impl WeightKind {
    /// `int4`, `int8` or `bf16`.
    pub(super) fn name(&self) -> String {
        self.bits.map_or_else(|| "bf16".to_owned(), |bits| format!("int{bits}"))
    }

    /// Random weights of this kind, `[rows, columns]`. What the numbers are changes no time.
    pub(super) fn weight(&self, rows: usize, columns: usize) -> Result<LinearWeight> {
        let mut noise = Noise(1);
        let matrix = match self.bits {
            None => {
                let values = (0..rows * columns).map(|_| bf16::from_f32(noise.next_weight())).collect();
                WeightMatrix::Dense(DenseMatrix::new(rows, columns, DenseValues::Bf16(values)))
            }
            Some(bits) => {
                let group_size = GroupSize::Columns(GROUP_COLUMNS);
                WeightMatrix::Quantized(QuantizedMatrix::new(QuantizedParts {
                    rows,
                    columns,
                    bits,
                    group_size,
                    codes: (0..rows * columns).map(|_| noise.next_byte() >> (8 - bits)).collect(),
                    scales: vec![2.0f32.powi(-4 - i32::from(bits)); rows * group_size.groups(columns)],
                    scale_type: ElementType::F16,
                    ..QuantizedParts::default()
                })?)
            }
        };
        let mut factor = |count| (0..count).map(|_| noise.next_weight()).collect();
        let low_rank = (self.rank > 0).then(|| {
            let (b, a) = (factor(rows * self.rank), factor(self.rank * columns));
            LowRank::new(rows, columns, self.rank, b, a, ElementType::Bf16)
        });
        Ok(LinearWeight { low_rank, ..LinearWeight::plain(matrix) })
    }
}

/// Rows of activations, `[count, columns]`.
pub(super) fn activations(count: usize, columns: usize) -> Vec<f32> {
    let mut noise = Noise(2);
    (0..count * columns).map(|_| 64.0 * noise.next_weight()).collect()
}

/// Evenly spread numbers from a linear congruence (Numerical Recipes, §7.1).
struct Noise(u32);

impl Noise {
    fn next_byte(&mut self) -> u8 {
        self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (self.0 >> 24) as u8
    }

    /// Below 1/32, and never zero.
    fn next_weight(&mut self) -> f32 {
        (f32::from(self.next_byte()) - 127.5) / 4096.0
    }
}
