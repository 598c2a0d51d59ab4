use kintsugi_calibration::Calibration;
use kintsugi_runtime::{Result, ThreadPool};
use kintsugi_weights::DenseMatrix;

use crate::{Awq, QuantizeOptions};

/// The error of a block whose readers have been replaced, in the order of [`ScaleGroup::readers`]. Only comparisons
/// matter, so any unit will do.
pub type BlockLoss<'a> = &'a mut dyn FnMut(&[DenseMatrix]) -> Result<f64>;

/// A method that rewrites a block without changing its function, so that a [`crate::LinearMethod`] rounds it better.
pub trait BlockMethod: Sync {
    /// The name that users write.
    fn name(&self) -> &'static str;

    /// The factors for the channels between one operation and the Linears that read it: the columns of the readers
    /// are multiplied by them, the outputs of the operation divided.
    ///
    /// # Errors
    /// Those of [`crate::LinearMethod::compress`] and of `loss`.
    fn scales(
        &self,
        group: &ScaleGroup<'_>,
        options: &QuantizeOptions,
        loss: BlockLoss<'_>,
        pool: &ThreadPool,
    ) -> Result<GroupScales>;
}

/// Every method.
pub const BLOCK_METHODS: &[&dyn BlockMethod] = &[&Awq];

/// The method of that name.
pub fn block_method(name: &str) -> Option<&'static dyn BlockMethod> {
    BLOCK_METHODS.iter().find(|method| method.name() == name).copied()
}

/// One operation and the Linears that read it.
pub struct ScaleGroup<'a> {
    /// The weights that read, all of the same width.
    pub readers: Vec<&'a DenseMatrix>,
    /// Statistics of what they read.
    pub calibration: &'a Calibration,
    /// The channel of the operation that each column reads: `0, 1, 2, …` unless heads share keys and values.
    pub channel_of: &'a [usize],
    /// The nearest factors that the operation can absorb, given what its parameters are stored in. It keeps 1.
    pub storable: &'a dyn Fn(Vec<f32>) -> Vec<f32>,
}

/// What a search found.
#[derive(Clone, Debug, PartialEq)]
pub struct GroupScales {
    /// Per channel of the operation.
    pub scales: Vec<f32>,
    /// Exponent of the activations that gave them.
    pub alpha: f64,
    /// Loss of the block with the readers scaled and rounded.
    pub loss: f64,
    /// The same without scales.
    pub unscaled_loss: f64,
}
