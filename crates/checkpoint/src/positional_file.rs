use std::fs::{self, File};
use std::io::{self, ErrorKind, Read};
use std::path::{Path, PathBuf};

use kintsugi_runtime::{Error, ErrorCode, Result};

/// A regular file that is read at positions, so that threads share it without a cursor. Its length is taken once.
#[derive(Debug)]
pub(crate) struct PositionalFile {
    file: File,
    path: PathBuf,
    length: u64,
}

impl PositionalFile {
    /// Opens a regular file (links are followed).
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let file = open_regular(path)?;
        let length = file.metadata()?.len();
        Ok(PositionalFile { file, path: path.to_path_buf(), length })
    }

    /// Bytes at the time of opening.
    pub(crate) fn length(&self) -> u64 {
        self.length
    }

    /// Where the file is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Fills `buffer` from byte `offset` on.
    ///
    /// # Errors
    /// `ERR_CHECKPOINT_CORRUPT` when the file has become shorter than that, `ERR_IO` when the system refuses.
    pub(crate) fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        read_exact_at(&self.file, buffer, offset).map_err(|error| match error.kind() {
            ErrorKind::UnexpectedEof => {
                Error::new(ErrorCode::CheckpointCorrupt, "the file became shorter while it was open")
                    .subject(self.path.display())
                    .hint("Do not change a checkpoint while it is in use; copy the file again")
            }
            _ => {
                Error::io(ErrorCode::Io, &self.path, &error).hint("Check the disk or network share that holds the file")
            }
        })
    }
}

/// The whole of a regular file that must not have more than `limit` bytes.
pub(crate) fn read_bounded(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let file = open_regular(path)?;
    let mut bytes = Vec::new();
    file.take(limit.saturating_add(1)).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        return Err(io::Error::new(ErrorKind::InvalidData, format!("the file has more than {limit} bytes")));
    }
    Ok(bytes)
}

/// Looks before it opens: opening a pipe would wait for a writer, and a folder would open but not read.
fn open_regular(path: &Path) -> io::Result<File> {
    if !fs::metadata(path)?.is_file() {
        return Err(io::Error::new(ErrorKind::InvalidInput, "it is not a regular file"));
    }
    File::open(path)
}

#[cfg(unix)]
fn read_exact_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, buffer, offset)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut buffer: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !buffer.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, buffer, offset) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                buffer = &mut buffer[count..];
                offset += count as u64;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_shrinks_gives_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weights");
        fs::write(&path, [7u8; 100]).unwrap();
        let file = PositionalFile::open(&path).unwrap();
        let mut buffer = [0; 60];
        file.read_exact_at(&mut buffer, 40).unwrap();
        assert_eq!(buffer, [7; 60]);
        File::options().write(true).open(&path).unwrap().set_len(50).unwrap();
        assert_eq!(file.read_exact_at(&mut buffer, 40).unwrap_err().code, ErrorCode::CheckpointCorrupt);
    }

    #[test]
    fn a_folder_and_a_file_over_the_limit_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(PositionalFile::open(folder.path()).unwrap_err().kind(), ErrorKind::InvalidInput);
        let path = folder.path().join("config");
        fs::write(&path, b"12345").unwrap();
        assert_eq!(read_bounded(&path, 5).unwrap(), b"12345");
        assert_eq!(read_bounded(&path, 4).unwrap_err().kind(), ErrorKind::InvalidData);
    }
}
