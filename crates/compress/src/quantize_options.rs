use kintsugi_runtime::{Error, ErrorCode, Result};
use kintsugi_weights::{CODE_BITS, ElementType, GroupSize};
use serde::{Deserialize, Serialize};

/// What to quantize to, and how. Methods ignore what does not concern them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct QuantizeOptions {
    /// Width of a code: 2, 3, 4, 5, 6 or 8.
    pub bits: u8,
    /// Weights that share a scale and a zero point.
    pub group_size: GroupSize,
    /// Which way the weights of a group lie.
    pub group_axis: AxisRule,
    /// Fixed zero point in the middle of the codes instead of one per group.
    pub symmetric: bool,
    /// The type that scales are stored in; solvers see them already rounded to it.
    pub scale_type: ElementType,
    /// Whether the range of a group shrinks where that lowers its error.
    pub clip: Clip,
    /// GPTQ: take columns by descending activation energy instead of in order.
    pub act_order: bool,
    /// GPTQ: choose every grid from the original weights before the first column is rounded. Without it a grid is
    /// chosen when its first column is reached, and with `act_order` columns then need a group index. Groups along the
    /// outputs lie inside one column each, so their grids are always chosen when that is reached.
    pub static_groups: bool,
    /// GPTQ: added to the diagonal of the second moment, relative to its mean over live channels.
    pub damping: f64,
}

/// How the axis of the groups of a Linear is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AxisRule {
    /// Groups along the inputs.
    #[default]
    Input,
    /// Groups along the outputs.
    Output,
    /// The axis along which rounding to nearest does less damage to the outputs of this Linear.
    Adaptive,
}

impl AxisRule {
    /// Every rule, as users write it.
    pub const NAMES: &'static [&'static str] = &["input", "output", "adaptive"];

    /// The rule of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        [AxisRule::Input, AxisRule::Output, AxisRule::Adaptive]
            .into_iter()
            .zip(Self::NAMES)
            .find(|(_, n)| **n == name)
            .map(|(rule, _)| rule)
    }
}

/// The error by which the range of a group may shrink (see [`crate::GridRule`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Clip {
    /// No range shrinks.
    Never,
    /// Of the weights, each with the energy of its input where that is known.
    Weights,
    /// Of what the group adds to the outputs; that of the weights where the inputs are not known together.
    Outputs,
}

impl Default for QuantizeOptions {
    /// 4 bits, groups of 128 along the inputs, asymmetric, bf16 scales, no clipping, act-order, static groups, damping 0.01.
    fn default() -> Self {
        QuantizeOptions {
            bits: 4,
            group_size: GroupSize::Columns(128),
            group_axis: AxisRule::Input,
            symmetric: false,
            scale_type: ElementType::Bf16,
            clip: Clip::Never,
            act_order: true,
            static_groups: true,
            damping: 0.01,
        }
    }
}

impl QuantizeOptions {
    /// Checks every value.
    ///
    /// # Errors
    /// `ERR_OPTION_INVALID`, with the name of the option as subject.
    pub fn validate(&self) -> Result<()> {
        let invalid = |option: &str, message: String, hint: &str| {
            Err(Error::new(ErrorCode::OptionInvalid, message).subject(option).hint(hint))
        };
        if !CODE_BITS.contains(&self.bits) {
            return invalid(
                "bits",
                format!("codes have 2, 3, 4, 5, 6 or 8 bits, not {}", self.bits),
                "Use 4 when in doubt",
            );
        }
        if self.group_size == GroupSize::Columns(0) {
            return invalid("groupSize", "a group has at least one column".into(), "Use 128, or the whole row");
        }
        if self.group_axis != AxisRule::Input && self.group_size == GroupSize::WholeRow {
            let message = "groups along the outputs have a size, not that of the whole row".into();
            return invalid("groupSize", message, "Use 128, or groups along the inputs");
        }
        if !(self.damping.is_finite() && self.damping >= 0.0) {
            let message = format!("damping is a share of the mean diagonal, not {}", self.damping);
            return invalid("damping", message, "Use 0.01 when in doubt");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_out_of_range_are_named() {
        assert_eq!(QuantizeOptions::default().validate(), Ok(()));
        let cases = [
            ("bits", QuantizeOptions { bits: 7, ..Default::default() }),
            ("groupSize", QuantizeOptions { group_size: GroupSize::Columns(0), ..Default::default() }),
            (
                "groupSize",
                QuantizeOptions { group_size: GroupSize::WholeRow, group_axis: AxisRule::Output, ..Default::default() },
            ),
            ("damping", QuantizeOptions { damping: -0.1, ..Default::default() }),
            ("damping", QuantizeOptions { damping: f64::NAN, ..Default::default() }),
        ];
        for (option, options) in cases {
            let error = options.validate().unwrap_err();
            assert_eq!((error.code, error.subject.as_str()), (ErrorCode::OptionInvalid, option));
            assert!(!error.hint.is_empty());
        }
    }
}
