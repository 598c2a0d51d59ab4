use kintsugi_runtime::{Error, ErrorCode, Result};

/// What each code of 4 bits stands for, before its scale: grids whose steps are not equal.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CodeTable([f32; 16]);

impl CodeTable {
    /// Four-bit floats with two bits of exponent and one of mantissa, the sign in bit 3 (OCP Microscaling Formats
    /// specification, "E2M1").
    pub const FP4: CodeTable =
        CodeTable([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]);

    /// Quantiles of a normal distribution scaled to ±1, zero among them (QLoRA, arXiv 2305.14314, appendix E).
    pub const NF4: CodeTable = CodeTable([
        -1.0,
        -0.696_192_8,
        -0.525_073_05,
        -0.394_917_5,
        -0.284_441_38,
        -0.184_773_43,
        -0.091_050_036,
        0.0,
        0.079_580_3,
        0.160_930_2,
        0.246_112_3,
        0.337_915_24,
        0.440_709_83,
        0.562_617,
        0.722_956_84,
        1.0,
    ]);

    /// The integers of ggml's `IQ4_NL` and `IQ4_XS`, spaced as weights are distributed.
    pub const IQ4_NL: CodeTable = CodeTable([
        -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0,
    ]);

    /// A table of other values.
    ///
    /// # Errors
    /// `ERR_SHAPE_MISMATCH` when a value is not finite.
    pub fn new(values: [f32; 16]) -> Result<Self> {
        match values.iter().position(|value| !value.is_finite()) {
            None => Ok(CodeTable(values)),
            Some(code) => {
                let message = format!("code {code} stands for {}", values[code]);
                Err(Error::new(ErrorCode::ShapeMismatch, message).subject("CodeTable"))
            }
        }
    }

    /// The value of each code.
    pub fn values(&self) -> &[f32; 16] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn four_bit_floats_follow_their_definition() {
        for (code, &value) in CodeTable::FP4.values().iter().enumerate() {
            let (exponent, mantissa) = (code >> 1 & 3, (code & 1) as f32);
            let size = if exponent == 0 {
                mantissa / 2.0
            } else {
                (1.0 + mantissa / 2.0) * f32::powi(2.0, exponent as i32 - 1)
            };
            let expected = if code < 8 { size } else { -size };
            assert_eq!(value.to_bits(), expected.to_bits(), "code {code}");
        }
    }

    #[test]
    fn tables_are_finite() {
        let mut values = *CodeTable::NF4.values();
        assert_eq!(CodeTable::new(values).unwrap(), CodeTable::NF4);
        values[3] = f32::NAN;
        assert_eq!(CodeTable::new(values).unwrap_err().code, ErrorCode::ShapeMismatch);
    }
}
