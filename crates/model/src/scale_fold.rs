use crate::{DecoderSpec, LinearSlot};

/// An operation whose outputs can be divided by a factor per channel, and the Linears whose columns are multiplied by
/// it in return: the block computes the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScaleFold {
    /// What absorbs the division.
    pub source: FoldSource,
    /// All Linears that read it.
    pub readers: &'static [LinearSlot],
}

/// What absorbs a factor per channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FoldSource {
    /// Weight of the norm before the attention.
    AttentionNorm,
    /// Weight of the norm before the MLP.
    MlpNorm,
    /// Last rows of a Linear, one per channel, and their biases. Their outputs reach the readers without anything but
    /// sums and products between.
    Rows(LinearSlot),
}

const VALUE_TO_OUTPUT: ScaleFold =
    ScaleFold { source: FoldSource::Rows(LinearSlot::Value), readers: &[LinearSlot::Output] };
const FUSED_VALUE_TO_OUTPUT: ScaleFold =
    ScaleFold { source: FoldSource::Rows(LinearSlot::QueryKeyValue), readers: &[LinearSlot::Output] };
const NORM_TO_HEADS: ScaleFold =
    ScaleFold { source: FoldSource::AttentionNorm, readers: &[LinearSlot::Query, LinearSlot::Key, LinearSlot::Value] };
const UP_TO_DOWN: ScaleFold = ScaleFold { source: FoldSource::Rows(LinearSlot::Up), readers: &[LinearSlot::Down] };

/// Of a block with gated MLP.
pub(crate) const GATED_FOLDS: &[ScaleFold] = &[
    NORM_TO_HEADS,
    VALUE_TO_OUTPUT,
    ScaleFold { source: FoldSource::MlpNorm, readers: &[LinearSlot::Gate, LinearSlot::Up] },
    UP_TO_DOWN,
];

/// The same with fused projections whose parts lie apart.
pub(crate) const FUSED_FOLDS: &[ScaleFold] = &[
    ScaleFold { source: FoldSource::AttentionNorm, readers: &[LinearSlot::QueryKeyValue] },
    FUSED_VALUE_TO_OUTPUT,
    ScaleFold { source: FoldSource::MlpNorm, readers: &[LinearSlot::GateUp] },
    ScaleFold { source: FoldSource::Rows(LinearSlot::GateUp), readers: &[LinearSlot::Down] },
];

/// Of a block with experts: the norm before them is also read by their router, which is not compressed.
pub(crate) const ATTENTION_FOLDS: &[ScaleFold] = &[NORM_TO_HEADS, VALUE_TO_OUTPUT];

/// The same with an expert that sees every token.
pub(crate) const SHARED_EXPERT_FOLDS: &[ScaleFold] = &[NORM_TO_HEADS, VALUE_TO_OUTPUT, UP_TO_DOWN];

/// Of a block whose MLP has no gate and whose norms have biases, which take no factor exactly.
pub(crate) const PLAIN_MLP_FOLDS: &[ScaleFold] = &[FUSED_VALUE_TO_OUTPUT];

impl ScaleFold {
    /// The channel of the source that each column of the readers reads. Query heads that share a value head share its
    /// channels; everywhere else it is the column itself.
    pub fn channel_of(&self, spec: &DecoderSpec) -> Vec<usize> {
        let columns = self.places(spec).map(|place| spec.linears[place].columns).next().unwrap_or(0);
        match self.source {
            FoldSource::Rows(LinearSlot::Value | LinearSlot::QueryKeyValue) => {
                let (width, shared) = (spec.head_dim, spec.heads / spec.kv_heads);
                (0..columns).map(|column| column / width / shared * width + column % width).collect()
            }
            _ => (0..columns).collect(),
        }
    }

    /// Places of the readers in [`DecoderSpec::linears`].
    pub fn places(&self, spec: &DecoderSpec) -> impl Iterator<Item = usize> {
        self.readers.iter().filter_map(|&reader| spec.place_of(reader))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{FAMILIES, NormKind, TapPoint};

    fn spec(architecture: &str) -> DecoderSpec {
        let config = json!({"architectures": [architecture], "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 16,
            "head_dim": 8, "n_embd": 64, "n_layer": 1, "n_head": 8, "num_experts": 4, "num_experts_per_tok": 2,
            "moe_intermediate_size": 8, "shared_expert_intermediate_size": 96});
        DecoderSpec::from_config(config.as_object().unwrap()).unwrap()
    }

    #[test]
    fn channels_of_every_fold_lie_within_its_source() {
        for family in FAMILIES {
            let spec = spec(family.architecture);
            assert!(family.folds.is_empty() || !spec.parallel, "{}", family.architecture);
            for fold in family.folds {
                let channel_of = fold.channel_of(&spec);
                let channels = channel_of.iter().max().unwrap() + 1;
                assert!((0..channels).all(|channel| channel_of.contains(&channel)), "{fold:?}");
                match fold.source {
                    FoldSource::AttentionNorm | FoldSource::MlpNorm => {
                        assert_eq!(channels, spec.hidden_size);
                        assert_ne!(family.norm, NormKind::Layer, "a norm with a bias takes no factor exactly");
                        // Whatever reads the norm has to be among the readers.
                        let tap = fold.readers[0].tap();
                        let reads = spec.linears.iter().filter(|linear| linear.slot.tap() == tap).count();
                        assert_eq!((fold.places(&spec).count(), fold.readers.len()), (reads, reads), "{fold:?}");
                        assert!(tap == TapPoint::AttentionInput || spec.experts.is_none(), "{fold:?}");
                    }
                    FoldSource::Rows(slot) => {
                        let rows = spec.linears[spec.place_of(slot).unwrap()].rows;
                        let expected = match slot {
                            LinearSlot::QueryKeyValue => spec.kv_width(),
                            LinearSlot::GateUp => rows / 2,
                            _ => rows,
                        };
                        assert_eq!(channels, expected, "{fold:?}");
                    }
                }
                assert!(fold.places(&spec).all(|place| spec.linears[place].columns == channel_of.len()));
            }
        }
    }

    #[test]
    fn query_heads_that_share_a_value_head_share_its_channels() {
        let spec = spec("LlamaForCausalLM");
        let channels = GATED_FOLDS[1].channel_of(&spec);
        assert_eq!(channels[..32], [0, 1, 2, 3, 4, 5, 6, 7].repeat(4));
        assert_eq!(channels[32..], [8, 9, 10, 11, 12, 13, 14, 15].repeat(4));
    }
}
