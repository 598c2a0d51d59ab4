use kintsugi_runtime::{Error, ErrorCode, Result};
use kintsugi_weights::{ElementType, GroupSize, QuantizedMatrix, QuantizedParts};
use serde::{Deserialize, Serialize};

/// What the factors of a compensation are stored in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FactorPrecision {
    /// Floats of that type.
    Float(ElementType),
    /// Codes of 8 or 4 bits with a scale for each run of [`FactorPrecision::GROUP`] values.
    ///
    /// A scale of codes of 8 bits is a power of two, one of codes of 4 bits has five significant bits: so every value is
    /// exact in bf16, and a PEFT folder in bf16 holds the same factors.
    Codes(u8),
}

impl Default for FactorPrecision {
    /// bf16.
    fn default() -> Self {
        FactorPrecision::Float(ElementType::Bf16)
    }
}

impl FactorPrecision {
    /// Values along the ranks in B, and along the inputs in A, that share a scale.
    pub const GROUP: usize = 64;

    /// The precision of that many bits: bf16, or codes.
    ///
    /// # Errors
    /// `ERR_OPTION_INVALID`.
    pub fn of_bits(bits: u8) -> Result<Self> {
        match bits {
            16 => Ok(FactorPrecision::Float(ElementType::Bf16)),
            4 | 8 => Ok(FactorPrecision::Codes(bits)),
            _ => Err(Error::new(ErrorCode::OptionInvalid, format!("factors have 16, 8 or 4 bits, not {bits}"))
                .subject("eora.factorBits")
                .hint("Use 16, 8 or 4")),
        }
    }

    /// Bits that the factors of a Linear take.
    pub fn stored_bits(self, rows: usize, columns: usize, rank: usize) -> u64 {
        let values = (rank * (rows + columns)) as u64;
        match self {
            FactorPrecision::Float(element) => values * element.bits() as u64,
            FactorPrecision::Codes(bits) => {
                let scales = rows * rank.div_ceil(Self::GROUP) + rank * columns.div_ceil(Self::GROUP);
                values * u64::from(bits) + scales as u64 * 16
            }
        }
    }
}

/// Rounds values to floats of a type.
///
/// # Errors
/// `ERR_VALUE_NOT_FINITE` where the type cannot hold one.
pub(crate) fn round_floats(values: &[f64], element: ElementType, factor: &str) -> Result<Vec<f32>> {
    let rounded: Vec<f32> = values.iter().map(|&value| element.round(value as f32)).collect();
    if rounded.iter().all(|value| value.is_finite()) {
        return Ok(rounded);
    }
    let message = format!("factor {factor} has values that {} cannot hold", element.name());
    Err(Error::new(ErrorCode::ValueNotFinite, message).subject("eora").hint("Store the factors as bf16 or f32"))
}

/// Codes for rows of values, a scale for each run of [`FactorPrecision::GROUP`] columns.
pub(crate) fn code_rows(values: &[f64], rows: usize, columns: usize, bits: u8) -> Result<QuantizedMatrix> {
    let group = FactorPrecision::GROUP;
    let mut codes = vec![0u8; rows * columns];
    let mut scales = Vec::with_capacity(rows * columns.div_ceil(group));
    for (values, codes) in values.chunks_exact(columns.max(1)).zip(codes.chunks_exact_mut(columns.max(1))) {
        for (values, codes) in values.chunks(group).zip(codes.chunks_mut(group)) {
            let scale = best_scale(values, bits);
            if !(scale as f32).is_finite() {
                let message = "a factor has values that codes cannot hold";
                return Err(Error::new(ErrorCode::ValueNotFinite, message)
                    .subject("eora")
                    .hint("Store the factors with 16 bits"));
            }
            scales.push(scale as f32);
            codes.iter_mut().zip(values).for_each(|(code, &value)| *code = encode(value, scale, bits));
        }
    }
    coded((rows, columns), bits, codes, scales)
}

/// The same codes, with zeros in some columns.
pub(crate) fn without_columns(coded_rows: &QuantizedMatrix, dropped: &[bool]) -> Result<QuantizedMatrix> {
    let (rows, columns, bits) = (coded_rows.rows(), coded_rows.columns(), coded_rows.bits());
    let zero = 1u8 << (bits - 1);
    let codes = coded_rows.codes().iter().enumerate();
    let codes = codes.map(|(at, &code)| if dropped[at % columns] { zero } else { code }).collect();
    coded((rows, columns), bits, codes, coded_rows.scales().to_vec())
}

fn coded((rows, columns): (usize, usize), bits: u8, codes: Vec<u8>, scales: Vec<f32>) -> Result<QuantizedMatrix> {
    QuantizedMatrix::new(QuantizedParts {
        rows,
        columns,
        bits,
        group_size: GroupSize::Columns(FactorPrecision::GROUP),
        codes,
        scales,
        scale_type: ElementType::Bf16,
        ..QuantizedParts::default()
    })
}

fn encode(value: f64, scale: f64, bits: u8) -> u8 {
    let centre = f64::from(1u16 << (bits - 1));
    ((value / scale).round().clamp(1.0 - centre, centre - 1.0) + centre) as u8
}

/// The scale that leaves the least squared error, of those that keep every value exact in bf16.
fn best_scale(values: &[f64], bits: u8) -> f64 {
    let largest = values.iter().fold(0.0f64, |largest, value| largest.max(value.abs()));
    if largest == 0.0 {
        return 1.0;
    }
    let most = f64::from((1u16 << (bits - 1)) - 1);
    let mantissa_bits = if bits == 8 { 0 } else { 4 };
    let error = |scale: f64| -> f64 {
        let centre = f64::from(1u16 << (bits - 1));
        values.iter().map(|&value| (value - (f64::from(encode(value, scale, bits)) - centre) * scale).powi(2)).sum()
    };
    // Down to half of the range: clipping the largest value may pay for the steps of all others.
    let mut best = round_up(largest / most, mantissa_bits);
    let mut least = error(best);
    for step in 1..=8 {
        let scale = round_up(largest / most * (1.0 - f64::from(step) / 16.0), mantissa_bits);
        let found = error(scale);
        if found < least {
            (best, least) = (scale, found);
        }
    }
    best
}

/// The smallest number that is not below `value` and has `mantissa_bits` bits behind the leading one; at least what
/// is normal in bf16.
fn round_up(value: f64, mantissa_bits: i32) -> f64 {
    let value = value.max(f64::from(f32::MIN_POSITIVE) * 256.0);
    let unit = (value.log2().floor() - f64::from(mantissa_bits)).exp2();
    (value / unit).ceil() * unit
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(count: usize) -> Vec<f64> {
        (0..count).map(|i| ((i * i) as f64 * 0.37).sin() * 10f64.powi((i / 70) as i32 % 5 - 2)).collect()
    }

    #[test]
    fn coded_values_are_exact_in_bf16_and_near() {
        for bits in [4, 8] {
            for (rows, columns) in [(3, 1), (2, 63), (5, 64), (4, 130)] {
                let original = values(rows * columns);
                let coded = code_rows(&original, rows, columns, bits).unwrap();
                let found = coded.to_f32();
                assert!(found.iter().all(|&value| ElementType::Bf16.round(value) == value));
                for (original, found) in original.chunks(columns).zip(found.chunks(columns)) {
                    for (original, found) in original.chunks(64).zip(found.chunks(64)) {
                        let largest = original.iter().fold(0.0f64, |most, value| most.max(value.abs()));
                        let worst = original.iter().zip(found).map(|(a, b)| (a - f64::from(*b)).powi(2)).sum::<f64>();
                        let step = largest / f64::from((1u16 << (bits - 1)) - 1) * if bits == 8 { 2.0 } else { 1.0625 };
                        assert!(worst.sqrt() <= step / 2.0 * (original.len() as f64).sqrt(), "{bits} {columns}");
                    }
                }
            }
        }
        let spared =
            without_columns(&code_rows(&values(140), 2, 70, 4).unwrap(), &[[true, false]; 35].concat()).unwrap();
        let pairs = spared.to_f32().into_iter().zip(code_rows(&values(140), 2, 70, 4).unwrap().to_f32());
        assert!(pairs.enumerate().all(|(at, (spared, coded))| spared == if at % 2 == 0 { 0.0 } else { coded }));
        assert!(code_rows(&[0.0; 4], 2, 2, 4).unwrap().to_f32().iter().all(|&value| value == 0.0));
        assert_eq!(code_rows(&[1e300; 4], 2, 2, 4).unwrap_err().code, ErrorCode::ValueNotFinite);
    }

    #[test]
    fn scales_have_the_bits_that_they_may_have() {
        for value in [1.0, 1.01, 3.3, 0.7, 1e-30, 0.999] {
            let (coarse, fine) = (round_up(value, 0), round_up(value, 4));
            assert!(coarse >= value && coarse < 2.0 * value && coarse.log2().fract() == 0.0, "{value} {coarse}");
            assert!(fine >= value && fine <= value * 1.0625, "{value} {fine}");
        }
    }

    #[test]
    fn other_widths_are_refused() {
        assert_eq!(FactorPrecision::of_bits(4).unwrap(), FactorPrecision::Codes(4));
        assert_eq!(FactorPrecision::of_bits(3).unwrap_err().code, ErrorCode::OptionInvalid);
        assert_eq!(FactorPrecision::of_bits(16).unwrap().stored_bits(10, 6, 3), 3 * 256);
        assert_eq!(FactorPrecision::of_bits(4).unwrap().stored_bits(128, 65, 2), 2 * 193 * 4 + (128 + 2 * 2) * 16);
    }
}
