use kintsugi_calibration::Calibration;
use kintsugi_runtime::ThreadPool;
use kintsugi_weights::RowSource;

use crate::channel_sums::ChannelSums;
use crate::output_energies::OutputEnergies;
use crate::residual_error::wide_row;

/// Squares of the outputs of an original weight W, without a bias, where somebody has computed them anyway: a pass that
/// takes the statistics of inputs multiplies them with W. Products in f32, sums of squares in f64.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct OutputSquares {
    /// `‖W X‖²` on the inputs of the statistics, each of which counts what it counts in them.
    pub calibration: f64,
    /// `‖W x‖²` of each input that is held out, in their order, weighted as they are; empty where that is not known.
    pub held_out: Vec<f64>,
}

impl OutputSquares {
    /// Those of Linears that stand on each other, the outputs of each multiplied with a factor.
    pub fn stacked(parts: &[(&OutputSquares, f32)]) -> Self {
        let mut all = OutputSquares::default();
        let tokens = parts.first().map_or(0, |(part, _)| part.held_out.len());
        if parts.iter().all(|(part, _)| part.held_out.len() == tokens) {
            all.held_out = vec![0.0; tokens];
        }
        for &(part, factor) in parts {
            let square = f64::from(factor).powi(2);
            all.calibration += square * part.calibration;
            all.held_out.iter_mut().zip(&part.held_out).for_each(|(sum, value)| *sum += square * value);
        }
        all
    }

    /// `‖W X‖²` where roundings of f32 do not show in it, as they do in outputs that cancel, and where the inputs of the
    /// statistics can have it: what is read from a file may be any number.
    pub(crate) fn accurate(&self, weight: &dyn RowSource, calibration: &Calibration, pool: &ThreadPool) -> Option<f64> {
        let fill = |i: usize, row: &mut [f64]| wide_row(weight, i, row);
        let channels = ChannelSums::new(weight.rows(), &calibration.energies(), fill, pool);
        let value = self.calibration;
        (channels.is_accurate(value) && channels.is_possible(value)).then_some(value)
    }

    /// Those of both halves of `tokens` held out inputs, where they are known.
    pub(crate) fn halves(&self, tokens: usize) -> Option<[f64; 2]> {
        let known = self.held_out.len() == tokens && self.held_out.iter().all(|value| value.is_finite());
        let (first, second) = self.held_out.split_at(self.held_out.len() / 2);
        known.then(|| [first, second].map(|half| half.iter().sum()))
    }
}

/// `‖W X‖²` of Linears that read one input: what is known of them, or computed from the statistics.
pub fn output_energies(
    weights: &[&dyn RowSource],
    calibration: &Calibration,
    known: &[Option<&OutputSquares>],
    pool: &ThreadPool,
) -> Vec<f64> {
    let mut energies = None;
    let of = |(&weight, known): (&&dyn RowSource, &Option<&OutputSquares>)| {
        known.and_then(|known| known.accurate(weight, calibration, pool)).unwrap_or_else(|| {
            let energies = energies.get_or_insert_with(|| OutputEnergies::new(calibration));
            energies.of(weight.rows(), |i, row| wide_row(weight, i, row), pool).value
        })
    };
    weights.iter().zip(known).map(of).collect()
}

#[cfg(test)]
mod tests {
    use kintsugi_calibration::CalibrationBuilder;
    use kintsugi_weights::DenseMatrix;

    use super::*;

    #[test]
    fn squares_of_groups_add_up_and_those_that_cancel_or_cannot_be_are_not_taken() {
        let pool = ThreadPool::with_threads(2);
        let one = OutputSquares { calibration: 3.0, held_out: vec![1.0, 2.0, 4.0] };
        let other = OutputSquares { calibration: 5.0, held_out: vec![8.0, 16.0, 32.0] };
        let both = OutputSquares::stacked(&[(&one, 1.0), (&other, 0.5)]);
        assert_eq!(both, OutputSquares { calibration: 4.25, held_out: vec![3.0, 6.0, 12.0] });
        assert_eq!((both.halves(3), both.halves(2)), (Some([3.0, 18.0]), None));
        let unknown = OutputSquares { held_out: Vec::new(), ..other };
        assert!(OutputSquares::stacked(&[(&one, 1.0), (&unknown, 1.0)]).held_out.is_empty());

        // Inputs with a mean that the second weight does not see.
        let mut builder = CalibrationBuilder::new(4);
        let inputs: Vec<f32> = (0..80).map(|at| 1000.0 + (at as f32 * 0.7).sin()).collect();
        builder.push(&inputs, &pool).unwrap();
        let calibration = builder.finish(&pool);
        let seen = DenseMatrix::from_f32(1, 4, vec![1.0, 0.5, 1.0, 0.25]);
        let unseen = DenseMatrix::from_f32(1, 4, vec![1.0, -1.0, 1.0, -1.0]);
        let squares = |matrix: &DenseMatrix| {
            let row = matrix.to_f32();
            let outputs = inputs.chunks(4).map(|x| x.iter().zip(&row).map(|(x, w)| x * w).sum::<f32>());
            OutputSquares { calibration: outputs.map(|y| f64::from(y).powi(2)).sum(), held_out: Vec::new() }
        };
        let of = |matrix: &DenseMatrix| squares(matrix).accurate(matrix, &calibration, &pool);
        assert_eq!((of(&seen), of(&unseen)), (Some(squares(&seen).calibration), None));
        let given = OutputSquares { calibration: 7e7, held_out: Vec::new() };
        let energies =
            output_energies(&[&seen, &unseen, &seen], &calibration, &[Some(&given), Some(&given), None], &pool);
        assert_eq!(energies[0], 7e7);
        assert!((energies[2] / squares(&seen).calibration - 1.0).abs() < 1e-6, "{energies:?}");
        assert_eq!(energies[1], 7e7, "it would not be small beside its channels");
        // All of these inputs are nearly alike, so the first weight has nearly the most that one of its size can have.
        for (share, taken) in [(0.5, true), (1.009, true), (1.02, false), (1e290, false), (f64::INFINITY, false)] {
            let given = OutputSquares { calibration: share * squares(&seen).calibration, held_out: Vec::new() };
            let found = given.accurate(&seen, &calibration, &pool);
            assert_eq!(found, taken.then_some(given.calibration), "{share}");
            let [energy] = output_energies(&[&seen], &calibration, &[Some(&given)], &pool)[..] else { unreachable!() };
            assert_eq!(energy, if taken { given.calibration } else { energies[2] }, "{share}");
        }
        let broken = OutputSquares { calibration: f64::NAN, held_out: vec![f64::NAN] };
        assert_eq!((broken.accurate(&seen, &calibration, &pool), broken.halves(1)), (None, None));
    }
}
