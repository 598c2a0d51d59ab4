//! Thread pool, cancellation, progress, CPU levels and the error type that every crate shares.
//!
//! Knows nothing about numbers, files of models, or Node.

mod atomic_replace;
mod cancel_token;
mod cpu_cache;
mod cpu_level;
mod disk_space;
mod error;
mod process_memory;
mod progress;
mod scratch_file;
mod thread_pool;

pub use atomic_replace::{StagedFolder, replace_file};
pub use cancel_token::CancelToken;
pub use cpu_cache::last_level_cache_bytes;
pub use cpu_level::{CpuFeatures, CpuLevel};
pub use disk_space::available_disk_bytes;
pub use error::{Error, ErrorCode, Result, nearest};
pub use process_memory::{available_memory_bytes, peak_memory_bytes, private_memory_bytes};
pub use progress::{Progress, ProgressSnapshot};
pub use scratch_file::ScratchFile;
pub use thread_pool::ThreadPool;
