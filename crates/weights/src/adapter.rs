use std::collections::BTreeMap;

use crate::LowRank;

/// The update of one Linear: `ΔW = scaling · B · A`.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterEntry {
    /// The factors.
    pub factors: LowRank,
    /// What the product is multiplied with (`alpha / rank`, or `alpha / √rank` for rsLoRA).
    pub scaling: f32,
}

/// Low-rank updates for many Linears, by the name of the Linear (`model.layers.0.self_attn.q_proj`).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Adapter {
    /// By Linear name, in name order.
    pub linears: BTreeMap<String, AdapterEntry>,
    /// The base model that the adapter says it belongs to.
    pub base_model: Option<String>,
}
