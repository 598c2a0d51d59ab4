use std::fmt::Debug;

use kintsugi_runtime::{Error, ErrorCode, Result};

use crate::positional_file::PositionalFile;

/// Bytes that are read at positions: a file, or a slice in memory.
pub trait ByteSource: Debug + Send + Sync {
    /// What errors call it: a path.
    fn name(&self) -> String;

    /// Bytes in all.
    fn length(&self) -> u64;

    /// Fills `buffer` from byte `offset` on.
    ///
    /// # Errors
    /// `ERR_CHECKPOINT_CORRUPT` when there are not so many bytes, `ERR_IO` when the system refuses.
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> Result<()>;
}

impl ByteSource for PositionalFile {
    fn name(&self) -> String {
        self.path().display().to_string()
    }

    fn length(&self) -> u64 {
        PositionalFile::length(self)
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        PositionalFile::read_exact_at(self, buffer, offset)
    }
}

impl ByteSource for &[u8] {
    fn name(&self) -> String {
        "bytes in memory".into()
    }

    fn length(&self) -> u64 {
        self.len() as u64
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let part = usize::try_from(offset).ok().and_then(|start| self.get(start..)?.get(..buffer.len()));
        match part {
            Some(part) => buffer.copy_from_slice(part),
            None => {
                return Err(Error::new(ErrorCode::CheckpointCorrupt, "the bytes end too early")
                    .subject(ByteSource::name(self))
                    .hint("Give all bytes of the file"));
            }
        }
        Ok(())
    }
}

impl ByteSource for Vec<u8> {
    fn name(&self) -> String {
        ByteSource::name(&self.as_slice())
    }

    fn length(&self) -> u64 {
        self.len() as u64
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        self.as_slice().read_exact_at(buffer, offset)
    }
}
