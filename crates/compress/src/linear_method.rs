use kintsugi_calibration::Calibration;
use kintsugi_runtime::{Error, ErrorCode, Result, ThreadPool, nearest};
use kintsugi_weights::{DenseMatrix, GroupAxis, QuantizedMatrix, QuantizedParts};

use crate::{BLOCK_METHODS, Gptq, Grid, QuantizeOptions, Rtn};

/// A method that compresses one Linear from its weight and the statistics of its input.
pub trait LinearMethod: Sync {
    /// The name that users write.
    fn name(&self) -> &'static str;

    /// Whether `compress` fails without calibration.
    fn needs_calibration(&self) -> bool;

    /// Quantizes `weight` (`[outFeatures, inFeatures]`). A calibration is checked even where it is not needed.
    ///
    /// # Errors
    /// `ERR_OPTION_INVALID` for options out of range or a missing calibration, `ERR_SHAPE_MISMATCH` for a calibration
    /// of another width, `ERR_VALUE_NOT_FINITE` for NaN or infinite weights, `ERR_SOLVER_FAILED`.
    fn compress(
        &self,
        weight: &DenseMatrix,
        calibration: Option<&Calibration>,
        options: &QuantizeOptions,
        pool: &ThreadPool,
    ) -> Result<QuantizedMatrix>;
}

/// Every method.
pub const METHODS: &[&dyn LinearMethod] = &[&Rtn, &Gptq];

/// The method of that name.
///
/// # Errors
/// `ERR_OPTION_INVALID`, with the nearest name and all names in the hint.
pub fn linear_method(name: &str) -> Result<&'static dyn LinearMethod> {
    METHODS.iter().find(|method| method.name() == name).copied().ok_or_else(|| {
        let blocks = BLOCK_METHODS.iter().map(|method| method.name());
        let names: Vec<&str> = METHODS.iter().map(|method| method.name()).chain(blocks).collect();
        let closest = nearest(name, names.iter().copied()).unwrap_or_default();
        Error::new(ErrorCode::OptionInvalid, format!("{name:?} is not a compression method"))
            .subject("method")
            .hint(format!("Did you mean {closest:?}? Methods are: {}", names.join(", ")))
    })
}

/// What every method asks of its arguments.
pub(crate) fn check_input(
    weight: &DenseMatrix,
    calibration: Option<&Calibration>,
    options: &QuantizeOptions,
) -> Result<()> {
    options.validate()?;
    if let Some((row, column)) = weight.first_not_finite() {
        let message = format!("the weight in row {row}, column {column} is NaN or infinite");
        return Err(Error::new(ErrorCode::ValueNotFinite, message)
            .subject("weight")
            .hint("The checkpoint is damaged; load it from its source again"));
    }
    if let Some(calibration) = calibration {
        if calibration.width() != weight.columns() {
            let message =
                format!("statistics of {} inputs for a weight of {} columns", calibration.width(), weight.columns());
            return Err(Error::new(ErrorCode::ShapeMismatch, message).subject("calibration"));
        }
        if calibration.tokens() == 0 {
            return Err(Error::new(ErrorCode::TextTooShort, "the calibration saw no tokens")
                .subject("calibration")
                .hint("Give a longer calibration text"));
        }
    }
    Ok(())
}

/// Joins codes `[rows, columns]` and grids, `[rows, groups]` or along the outputs `[groups, columns]`, to the matrix that
/// `options` describe.
pub(crate) fn assemble(
    weight: &DenseMatrix,
    options: &QuantizeOptions,
    group_axis: GroupAxis,
    codes: Vec<u8>,
    grids: &[Grid],
    group_index: Option<Vec<u32>>,
) -> Result<QuantizedMatrix> {
    QuantizedMatrix::new(QuantizedParts {
        rows: weight.rows(),
        columns: weight.columns(),
        bits: options.bits,
        group_size: options.group_size,
        group_axis,
        codes,
        scales: grids.iter().map(|grid| grid.scale).collect(),
        scale_type: options.scale_type,
        zero_points: (!options.symmetric).then(|| grids.iter().map(|grid| grid.zero).collect()),
        group_index,
        ..QuantizedParts::default()
    })
}

#[cfg(test)]
mod tests {
    use kintsugi_calibration::CalibrationBuilder;

    use super::*;

    #[test]
    fn methods_are_found_by_name_and_typos_are_answered() {
        for method in METHODS {
            assert_eq!(linear_method(method.name()).unwrap().name(), method.name());
        }
        let Err(error) = linear_method("gtpq") else { panic!("gtpq is no method") };
        assert_eq!(error.code, ErrorCode::OptionInvalid);
        assert!(error.hint.contains("Did you mean \"gptq\"") && error.hint.contains("rtn, gptq"), "{}", error.hint);
    }

    #[test]
    fn every_method_checks_weight_calibration_and_options() {
        let pool = ThreadPool::with_threads(1);
        let calibration = |width: usize, tokens: usize| {
            let mut builder = CalibrationBuilder::new(width);
            builder.push(&vec![1.0; width * tokens], &pool).unwrap();
            builder.finish(&pool)
        };
        let good = DenseMatrix::from_f32(2, 3, vec![0.5; 6]);
        let broken = DenseMatrix::from_f32(2, 3, vec![f32::INFINITY; 6]);
        let options = QuantizeOptions::default();
        let wrong = QuantizeOptions { bits: 7, ..Default::default() };
        for method in METHODS {
            let code = |weight: &DenseMatrix, calibration: &Calibration, options: &QuantizeOptions| {
                method.compress(weight, Some(calibration), options, &pool).err().map(|error| error.code)
            };
            assert_eq!(code(&good, &calibration(3, 5), &options), None);
            assert_eq!(code(&broken, &calibration(3, 5), &options), Some(ErrorCode::ValueNotFinite));
            assert_eq!(code(&good, &calibration(4, 5), &options), Some(ErrorCode::ShapeMismatch));
            assert_eq!(code(&good, &calibration(3, 0), &options), Some(ErrorCode::TextTooShort));
            assert_eq!(code(&good, &calibration(3, 5), &wrong), Some(ErrorCode::OptionInvalid));
            assert_eq!(method.compress(&good, None, &options, &pool).is_err(), method.needs_calibration());
        }
    }
}
