/// Largest exponent: outputs that are smaller still are hardly there, and may be nothing but rounding.
const MOST: f64 = 10.0;

/// What the outputs of Linears that share an A are multiplied with before their residuals are one: powers of two near
/// `1 / ‖W X‖`, relative to the largest outputs, so that errors count relative to the outputs of each Linear and not to
/// those of the loudest one, from the `‖W X‖²` of each. Powers of two change no digit of a residual or of factors.
pub fn group_scales(energies: &[f64]) -> Vec<f32> {
    let largest = energies.iter().fold(0.0f64, |largest, &energy| largest.max(energy));
    let scale = |&energy: &f64| {
        // A weight that is not finite is refused when it is solved for.
        let exponent = ((largest / energy).log2() / 2.0).round();
        if exponent.is_finite() { exponent.clamp(0.0, MOST).exp2() as f32 } else { 1.0 }
    };
    energies.iter().map(scale).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outputs_of_any_size_become_alike() {
        assert_eq!(group_scales(&[2.0, 2e4, 0.0, 2e-40]), [128.0, 1.0, 1.0, 1024.0]);
        assert_eq!(group_scales(&[3.0]), [1.0]);
        let with_nan = group_scales(&[2e-40, f64::NAN]);
        assert!(with_nan.iter().all(|scale| scale.is_finite()), "{with_nan:?}");
    }
}
