//! Checkpoint folders on disk: safetensors, Hugging Face `config.json`, compressed-tensors, GPTQ, AWQ, PEFT adapters.
//!
//! Readers trust nothing: every size is checked against the file before memory is taken, files are read at positions
//! (never mapped: a mapped file that shrinks kills the process), and damage is an error with the name of the file or
//! tensor. Writers stream into a staging folder that becomes the result by one rename.

#[cfg(target_endian = "big")]
compile_error!("safetensors is little-endian and tensors are read in place; a big-endian target needs byte swaps");

mod adapter_folder;
mod adapter_writer;
mod byte_source;
mod checkpoint;
mod checkpoint_writer;
mod companion_files;
mod config_fields;
mod factor_biases;
mod factor_centres;
mod factor_rows;
mod factor_scales;
mod float8_scaling;
mod formats;
pub mod gguf;
mod ledger;
mod linear_format;
mod linear_storage;
mod linear_tensors;
mod module_pattern;
mod packed_rows;
mod peft_adapter;
mod peft_config;
mod positional_file;
mod quantization_config;
mod safetensors_file;
mod safetensors_writer;
mod scheme;
mod shard_index;
mod staged_parts;
mod tensor_file;
mod tensor_set;
mod torch_archive;
mod torch_pickle;

pub use adapter_folder::{AdapterFolder, AdapterModule, ModuleKind, WholeTensor, saved_whole};
pub use adapter_writer::{AdapterDescription, AdapterWriter, MergedModule};
pub use byte_source::ByteSource;
pub use checkpoint::Checkpoint;
pub use checkpoint_writer::{CheckpointWriter, UnitRecord};
pub use factor_rows::FactorRows;
pub use formats::{Awq, BitsAndBytes, Float4, Gptq, IntQuantized, Kintsugi, PackQuantized};
pub use ledger::{Ledger, RecordedUnit};
pub use linear_format::{CodeGrid, EncodedTensor, FORMATS, LinearFormat, MatrixForm, linear_format};
pub use linear_tensors::LinearTensors;
pub use peft_adapter::{read_adapter, write_adapter, write_adapter_files};
pub use quantization_config::QuantizationConfig;
pub use scheme::{LinearTarget, Scheme, SchemeException};
pub use tensor_file::{NumberType, TensorFile, TensorFileWriter};
pub use tensor_set::TensorInfo;
