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
    /// Gate of an expert.
    ExpertGate(u16),
    /// Up projection of an expert.
    ExpertUp(u16),
    /// Down projection of an expert.
    ExpertDown(u16),
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
    /// Normed input of the MLP in the rows that reach an expert: its gate, up.
    ExpertInput(u16),
    /// Activation of an expert: its down projection.
    ExpertActivation(u16),
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
            LinearSlot::ExpertGate(expert) | LinearSlot::ExpertUp(expert) => TapPoint::ExpertInput(expert),
            LinearSlot::ExpertDown(expert) => TapPoint::ExpertActivation(expert),
        }
    }
}

impl TapPoint {
    /// Number of the stages of a block.
    pub const STAGES: usize = 4;

    /// The stage of the block, in the order of computation: what is read at points of one stage does not depend on
    /// Linears that are read at others of it.
    pub const fn stage(self) -> usize {
        match self {
            TapPoint::AttentionInput => 0,
            TapPoint::AttentionOutput => 1,
            TapPoint::MlpInput | TapPoint::ExpertInput(_) => 2,
            TapPoint::MlpActivation | TapPoint::ExpertActivation(_) => 3,
        }
    }
}
