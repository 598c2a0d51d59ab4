use std::collections::BTreeMap;
use std::ops::Range;

use kintsugi_calibration::{Drift, DriftBuilder};
use kintsugi_compensate::HoldOut;
use kintsugi_model::{Backend, Block, DecoderSpec, TapPoint};
use kintsugi_runtime::{CancelToken, Error, ErrorCode, Result, ThreadPool};

use crate::calibration_stream::{HeldRows, Seen, refuse_overflow, width_at};
use crate::{CalibrationStream, CapturedInputs};

/// How far the inputs of Linears have drifted from those of the dense model, by the points that they read at.
#[derive(Clone, Debug, Default)]
pub struct CapturedDrift {
    /// Of the tokens that statistics are taken from.
    pub statistics: BTreeMap<TapPoint, Drift>,
    /// `x − x̂` of the tokens that take no part in them.
    pub held_out: BTreeMap<TapPoint, HoldOut>,
}

/// The dense model while the inputs of the deployed one are captured: its block runs over the same tokens, pass by pass,
/// and what both read is compared.
///
/// A token that an expert gets in the deployed model, but not in the dense one, has no other input to compare with, and
/// counts as one that has not drifted: the expert is asked for what it would have made of the deployed input. One that it
/// gets in the dense model alone is none of its inputs.
pub(crate) struct DenseCompanion<'a, B: Backend> {
    stream: &'a mut CalibrationStream<B>,
    block: &'a Block<B>,
    backend: &'a B,
    spec: &'a DecoderSpec,
    points: &'a [TapPoint],
    cancel: &'a CancelToken,
    /// What is read in this pass.
    inputs: BTreeMap<TapPoint, DenseInputs>,
    builders: BTreeMap<TapPoint, (f64, DriftBuilder)>,
    held_out: BTreeMap<TapPoint, HeldRows>,
}

/// The inputs at a point in one pass.
struct DenseInputs {
    /// `[count, width]`
    values: Vec<f32>,
    /// The rows of the pass that they are, ascending; `None` for all.
    rows: Option<Vec<usize>>,
}

impl<B: Backend> CalibrationStream<B> {
    /// [`CalibrationStream::capture`] of `blocks.0` on this stream, and how far the inputs are from those of `blocks.1`, the
    /// original block, on the stream of the dense model. Both streams stay as they are.
    ///
    /// # Errors
    /// As [`CalibrationStream::capture`].
    pub fn capture_drift(
        &mut self,
        dense: &mut CalibrationStream<B>,
        backend: &B,
        blocks: (&Block<B>, &Block<B>),
        spec: &DecoderSpec,
        points: &[TapPoint],
        cancel: &CancelToken,
    ) -> Result<(CapturedInputs, CapturedDrift)> {
        let mut companion = DenseCompanion {
            stream: dense,
            block: blocks.1,
            backend,
            spec,
            points,
            cancel,
            inputs: BTreeMap::new(),
            builders: BTreeMap::new(),
            held_out: BTreeMap::new(),
        };
        let captured = self.capture_beside(Some(&mut companion), backend, blocks.0, points, cancel)?;
        Ok((captured, companion.finish()))
    }
}

impl<B: Backend> DenseCompanion<'_, B> {
    /// Runs the dense block over the tokens of a pass.
    pub(crate) fn run(&mut self, tokens: Range<usize>) -> Result<()> {
        let DenseCompanion { stream, block, backend, points, cancel, inputs, .. } = self;
        inputs.clear();
        stream.run(backend, block, tokens, false, cancel, &mut |seen| {
            if let Seen::Input(point, tensor, routed) = seen
                && points.contains(&point)
            {
                let values = backend.download(tensor)?.into_owned();
                inputs.insert(point, DenseInputs { values, rows: routed.map(<[usize]>::to_vec) });
            }
            Ok(())
        })
    }

    /// Adds what the deployed model reads at a point in the pass, each of which counts `weight` times.
    pub(crate) fn compare(
        &mut self,
        point: TapPoint,
        deployed: &[f32],
        routed: Option<&[usize]>,
        weight: f64,
    ) -> Result<()> {
        let (pool, width) = (ThreadPool::global(), self.width(point)?);
        let drift = self.drift(point, deployed, routed, width);
        let (weighed, builder) = self.builders.entry(point).or_insert_with(|| (1.0, DriftBuilder::new(width)));
        if *weighed != weight {
            builder.weigh(weight, pool);
            *weighed = weight;
        }
        builder.push(&drift, deployed, pool)
    }

    /// The same for tokens that are held out.
    pub(crate) fn hold_out(
        &mut self,
        point: TapPoint,
        deployed: &[f32],
        routed: Option<&[usize]>,
        weight: f64,
    ) -> Result<()> {
        let width = self.width(point)?;
        let drift = self.drift(point, deployed, routed, width);
        refuse_overflow(&drift, width)?;
        self.held_out.entry(point).or_default().push(&drift, width, weight);
        Ok(())
    }

    fn width(&self, point: TapPoint) -> Result<usize> {
        width_at(self.spec, point).ok_or_else(|| Error::new(ErrorCode::Internal, "no Linear reads at this point"))
    }

    /// `x − x̂`, row by row.
    fn drift(&self, point: TapPoint, deployed: &[f32], routed: Option<&[usize]>, width: usize) -> Vec<f32> {
        let mut drift = vec![0.0; deployed.len()];
        // No token has come to this expert in the dense model.
        let Some(dense) = self.inputs.get(&point) else { return drift };
        let rows = drift.chunks_exact_mut(width).zip(deployed.chunks_exact(width));
        for (i, (out, deployed)) in rows.enumerate() {
            let place = match (&dense.rows, routed) {
                (Some(rows), Some(routed)) => rows.binary_search(&routed[i]).ok(),
                _ => Some(i),
            };
            let Some(place) = place else { continue };
            let dense = &dense.values[place * width..(place + 1) * width];
            out.iter_mut().zip(dense.iter().zip(deployed)).for_each(|(out, (x, deployed))| *out = x - deployed);
        }
        drift
    }

    fn finish(self) -> CapturedDrift {
        let (pool, spec) = (ThreadPool::global(), self.spec);
        let held_out = self.held_out.into_iter();
        CapturedDrift {
            statistics: self.builders.into_iter().map(|(point, (_, builder))| (point, builder.finish(pool))).collect(),
            held_out: held_out.filter_map(|(point, rows)| Some((point, rows.finish(width_at(spec, point)?)))).collect(),
        }
    }
}
