use serde::Serialize;

/// What measurements in several rounds came to.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// A tenth of the rounds is below.
    pub low: f64,
    /// Half of the rounds is below.
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
        let quantile = |share: f64| sorted[(share * (sorted.len() - 1) as f64).round() as usize];
        Spread { low: quantile(0.1), median: quantile(0.5), high: quantile(0.9) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_those_of_the_sorted_values() {
        assert_eq!(Spread::of(&[3.0]), Spread { low: 3.0, median: 3.0, high: 3.0 });
        let values: Vec<f64> = (0..11).rev().map(f64::from).collect();
        assert_eq!(Spread::of(&values), Spread { low: 1.0, median: 5.0, high: 9.0 });
    }
}
