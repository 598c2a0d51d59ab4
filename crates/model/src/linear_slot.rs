/// A Linear of a decoder block, by what it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum LinearSlot {
    /// Query projection.
    Query,
    /// Key projection.
    Key,
    /// Value projection.
    Value,
    /// Query, key and value projection in one matrix.
    QueryKeyValue,
    /// Output projection of the attention.
    Output,
    /// Gate of a gated MLP.
    Gate,
    /// Up projection of the MLP.
    Up,
    /// Gate and up projection in one matrix.
    GateUp,
    /// Down projection of the MLP.
    Down,
}

/// A place in a block where Linears read their input. Linears of one point share their second moments.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum TapPoint {
    /// Normed input: query, key, value.
    AttentionInput,
    /// Concatenated heads: output projection.
    AttentionOutput,
    /// Normed input of the MLP: gate, up.
    MlpInput,
    /// Activation of the MLP: down projection.
    MlpActivation,
}

impl LinearSlot {
    /// Where this Linear reads its input.
    pub const fn tap(self) -> TapPoint {
        match self {
            LinearSlot::Query | LinearSlot::Key | LinearSlot::Value | LinearSlot::QueryKeyValue => {
                TapPoint::AttentionInput
            }
            LinearSlot::Output => TapPoint::AttentionOutput,
            LinearSlot::Gate | LinearSlot::Up | LinearSlot::GateUp => TapPoint::MlpInput,
            LinearSlot::Down => TapPoint::MlpActivation,
        }
    }
}

impl TapPoint {
    /// Every point, in the order in which a block reaches them.
    pub const ALL: [TapPoint; 4] =
        [TapPoint::AttentionInput, TapPoint::AttentionOutput, TapPoint::MlpInput, TapPoint::MlpActivation];
}
