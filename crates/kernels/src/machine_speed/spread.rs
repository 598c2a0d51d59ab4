use serde::Serialize;

/// What measurements in several rounds came to.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// A tenth of the rounds is below.
    pub low: f64,
    /// Half of the rounds is below; of an even number, the mean of the two in the middle.
    pub median: f64,
    /// A tenth of the rounds is above.
    pub high: f64,
}

impl Spread {
    /// The spread of some measurements.
    ///
    /// # Panics
    /// When there are none.
    pub fn of(values: &[f64]) -> Self {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let last = sorted.len() - 1;
        let quantile = |share: f64| sorted[(share * last as f64).round() as usize];
        let median = f64::midpoint(sorted[last / 2], sorted[last.div_ceil(2)]);
        Spread { low: quantile(0.1), median, high: quantile(0.9) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_those_of_the_sorted_values() {
        assert_eq!(Spread::of(&[3.0]), Spread { low: 3.0, median: 3.0, high: 3.0 });
        assert_eq!(Spread::of(&[5.0, 3.0]), Spread { low: 3.0, median: 4.0, high: 5.0 });
        assert_eq!(Spread::of(&[9.0, 1.0, 2.0, 4.0]).median, 3.0);
        let values: Vec<f64> = (0..11).rev().map(f64::from).collect();
        assert_eq!(Spread::of(&values), Spread { low: 1.0, median: 5.0, high: 9.0 });
    }
}
