//! Decoder families as data, one forward pass over a [`Backend`], KV cache, sampling, perplexity.
//!
//! Knows how a decoder computes; knows nothing of how its weights were compressed.

mod backend;
mod batch;
mod block;
mod candle_backend;
mod compensation_choice;
mod config_fields;
mod contained;
mod cpu_backend;
mod decoder_family;
mod decoder_spec;
mod divergence;
mod embedding;
mod expert_spec;
mod generation;
mod head;
mod linear_slot;
mod loaded_model;
mod model;
mod model_weights;
mod perplexity;
mod rotary_spec;
mod rotary_tables;
mod sampler;
mod scale_fold;
mod session;
mod stop_strings;
mod tokenizer;
mod tokenizer_document;
mod workspace;

pub use backend::{AttentionShape, Backend, ColumnRuns};
pub use batch::{Batch, Segment};
pub use block::{Block, Tap, Taps};
pub use candle_backend::CandleBackend;
pub use compensation_choice::CompensationChoice;
pub use cpu_backend::CpuBackend;
pub use decoder_family::{
    BiasRule, DecoderFamily, ExpertRule, FAMILIES, FusedHeads, NormKind, PositionRule, ResidualRule, SizeFields,
    WindowRule,
};
pub use decoder_spec::{DecoderSpec, LinearSpec};
pub use divergence::{Divergence, mean_divergences};
pub use embedding::Embedding;
pub use expert_spec::ExpertSpec;
pub use generation::{FinishReason, GenerateOptions, Generation, GenerationSummary, Piece};
pub use head::Head;
pub use kintsugi_kernels::{Activation, Precision, Scores};
pub use linear_slot::{LinearSlot, TapPoint};
pub use loaded_model::{BACKENDS, LoadOptions, LoadedModel, PieceSource};
pub use model::Model;
pub use model_weights::{BlockWeights, ModelWeights, NormWeight, attach_compensation, read_tokenizer};
pub use perplexity::{HEAD_ROWS, Perplexity, token_windows};
pub use rotary_spec::RotarySpec;
pub use rotary_tables::RotaryTables;
pub use sampler::{Sampler, SamplingOptions};
pub use scale_fold::{FoldSource, ScaleFold};
pub use session::{PagePool, Session};
pub use stop_strings::StopStrings;
pub use tokenizer::{TextStream, Tokenizer};
pub use workspace::Workspace;
