use std::fs::{File, OpenOptions, TryLockError};
use std::path::{Path, PathBuf};

use crate::{Error, ErrorCode, Result};

/// A file that a job keeps data in that would not fit into memory: read and written at positions.
#[derive(Debug)]
pub struct ScratchFile {
    file: File,
    path: PathBuf,
}

impl ScratchFile {
    /// An empty file; what was there is lost.
    ///
    /// # Errors
    /// `ERR_OUTPUT_UNWRITABLE`.
    pub fn create(path: &Path) -> Result<Self> {
        let mut options = File::options();
        Self::with(path, options.read(true).write(true).create(true).truncate(true))
    }

    /// A file that an earlier run wrote.
    ///
    /// # Errors
    /// `ERR_OUTPUT_UNWRITABLE`.
    pub fn open(path: &Path) -> Result<Self> {
        Self::with(path, File::options().read(true).write(true))
    }

    /// A file that this job alone writes, with what an earlier run left in it or empty. The lock goes with the file.
    ///
    /// # Errors
    /// `ERR_OUTPUT_BUSY` while another job has it, `ERR_OUTPUT_UNWRITABLE`.
    pub fn exclusive(path: &Path) -> Result<Self> {
        let mut options = File::options();
        let file = Self::with(path, options.read(true).write(true).create(true).truncate(false))?;
        match file.file.try_lock() {
            Ok(()) => Ok(file),
            Err(TryLockError::WouldBlock) => Err(Error::new(ErrorCode::OutputBusy, "another job is writing this file")
                .subject(path.display())
                .hint("Wait for it, or choose another file")),
            Err(TryLockError::Error(error)) => Err(Error::unwritable(path, &error)),
        }
    }

    fn with(path: &Path, options: &OpenOptions) -> Result<Self> {
        let file = options.open(path).map_err(|error| Error::unwritable(path, &error))?;
        Ok(ScratchFile { file, path: path.to_path_buf() })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its length in bytes.
    ///
    /// # Errors
    /// `ERR_OUTPUT_UNWRITABLE`.
    pub fn length(&self) -> Result<u64> {
        Ok(self.file.metadata().map_err(|error| Error::unwritable(&self.path, &error))?.len())
    }

    /// Sets its length; what is new is zero.
    ///
    /// # Errors
    /// `ERR_OUTPUT_UNWRITABLE`.
    pub fn set_length(&self, bytes: u64) -> Result<()> {
        self.file.set_len(bytes).map_err(|error| Error::unwritable(&self.path, &error))
    }

    /// Fills `buffer` from byte `offset` on.
    ///
    /// # Errors
    /// `ERR_OUTPUT_UNWRITABLE` when the file is shorter or the system refuses.
    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        positional::read_exact(&self.file, buffer, offset).map_err(|error| Error::unwritable(&self.path, &error))
    }

    /// Writes all of `bytes` from byte `offset` on.
    ///
    /// # Errors
    /// `ERR_OUTPUT_UNWRITABLE`.
    pub fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()> {
        positional::write_all(&self.file, bytes, offset).map_err(|error| Error::unwritable(&self.path, &error))
    }

    /// Returns when what was written is on the disk.
    ///
    /// # Errors
    /// `ERR_OUTPUT_UNWRITABLE`.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_all().map_err(|error| Error::unwritable(&self.path, &error))
    }
}

#[cfg(unix)]
mod positional {
    use std::os::unix::fs::FileExt;

    pub(super) fn read_exact(file: &std::fs::File, buffer: &mut [u8], offset: u64) -> std::io::Result<()> {
        file.read_exact_at(buffer, offset)
    }

    pub(super) fn write_all(file: &std::fs::File, bytes: &[u8], offset: u64) -> std::io::Result<()> {
        file.write_all_at(bytes, offset)
    }
}

#[cfg(windows)]
mod positional {
    use std::io::{Error, ErrorKind, Result};
    use std::os::windows::fs::FileExt;

    pub(super) fn read_exact(file: &std::fs::File, mut buffer: &mut [u8], mut offset: u64) -> Result<()> {
        while !buffer.is_empty() {
            let count = again(|| file.seek_read(buffer, offset))?;
            if count == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            buffer = &mut buffer[count..];
            offset += count as u64;
        }
        Ok(())
    }

    pub(super) fn write_all(file: &std::fs::File, mut bytes: &[u8], mut offset: u64) -> Result<()> {
        while !bytes.is_empty() {
            let count = again(|| file.seek_write(bytes, offset))?;
            if count == 0 {
                return Err(ErrorKind::WriteZero.into());
            }
            bytes = &bytes[count..];
            offset += count as u64;
        }
        Ok(())
    }

    fn again(mut work: impl FnMut() -> Result<usize>) -> Result<usize> {
        loop {
            match work() {
                Err(error) if Error::kind(&error) == ErrorKind::Interrupted => {}
                outcome => return outcome,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_at_a_position_is_read_there_and_the_end_is_an_error() {
        let path = std::env::temp_dir().join(format!("kintsugi-runtime-{}-scratch", std::process::id()));
        let file = ScratchFile::create(&path).unwrap();
        file.write_at(b"behind", 4).unwrap();
        file.write_at(b"head", 0).unwrap();
        file.sync().unwrap();
        assert_eq!(file.length().unwrap(), 10);
        let again = ScratchFile::open(&path).unwrap();
        let mut buffer = [0; 6];
        again.read_at(&mut buffer, 2).unwrap();
        assert_eq!(&buffer, b"adbehi");
        assert_eq!(again.read_at(&mut buffer, 5).unwrap_err().code, ErrorCode::OutputUnwritable);
        std::fs::remove_file(&path).unwrap();
        assert_eq!(ScratchFile::open(&path).unwrap_err().code, ErrorCode::OutputUnwritable);
    }
}
