//! GGUF files, in and out.
//!
//! `GgufFile` reads the container, `GGUF_TYPES` is the table of the types of tensors, `names` and `gguf_config` are the
//! tables between the names of GGUF and those of Hugging Face, `GgufTensors` shows a file as a checkpoint in the layout
//! of Hugging Face.

mod block_decoder;
mod block_encoder;
mod block_format;
mod code_tables;
mod gguf_config;
mod gguf_export;
mod gguf_file;
mod gguf_folder;
mod gguf_metadata;
mod gguf_tensors;
mod gguf_vocabulary;
mod gguf_writer;
mod header_reader;
mod k_quants;
mod legacy_blocks;
mod names;
mod pre_tokenizers;
mod rounding;
mod ternary;
mod vocabulary_writer;

pub use block_encoder::exact_type;
pub use block_format::{
    BlockCodes, BlockContent, BlockGrid, BlockParts, GGUF_TYPES, GgufType, PackBlock, RoundBlock, UnpackBlock,
};
pub use gguf_export::{GgufPlan, GgufSummary, check_gguf, write_gguf};
pub use gguf_file::{GgufFile, GgufHeader, GgufTensor};
pub use gguf_folder::{GGUF_FILE, into_gguf_folder};
pub use gguf_metadata::{GgufArray, GgufMetadata, GgufValue};
pub(crate) use gguf_tensors::{GgufTensors, is_gguf, only_file_of};
pub(crate) use gguf_vocabulary::chat_template_of;
pub use gguf_vocabulary::tokenizer_of;
pub use gguf_writer::{GgufEntry, GgufWriter};
