use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use kintsugi_runtime::{Error, ErrorCode, Result};

use super::gguf_file::{ALIGNMENT, DEFAULT_ALIGNMENT, MAGIC, VERSION};
use super::gguf_metadata::write_string;
use super::{GgufMetadata, GgufType, GgufValue};

const BUFFER_BYTES: usize = 1 << 20;

/// Writes one GGUF file front to back: metadata and tensor table, then the bytes of the tensors in the order of the
/// table. The file has another name until it is whole; dropped before [`GgufWriter::finish`], it is removed.
#[derive(Debug)]
pub struct GgufWriter {
    /// `None` once the file has its name.
    output: Option<BufWriter<File>>,
    path: PathBuf,
    temporary: PathBuf,
    /// Bytes of each tensor that are still to come, the next one first, and the padding behind it.
    left: std::vec::IntoIter<u64>,
    of_current: u64,
    padding: usize,
    total: u64,
}

/// What the table says about a tensor that will be written.
#[derive(Clone, Debug)]
pub struct GgufEntry {
    /// Name in GGUF, e.g. `blk.0.attn_q.weight`.
    pub name: String,
    /// Type of its blocks.
    pub gguf_type: &'static GgufType,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
}

impl GgufWriter {
    /// Creates the file and writes metadata and table.
    ///
    /// # Errors
    /// `ERR_OUTPUT_NOT_EMPTY` when the file exists, `ERR_OUTPUT_UNWRITABLE`, `ERR_INTERNAL` for a tensor whose rows
    /// are no whole blocks of its type.
    pub fn create(path: &Path, metadata: &GgufMetadata, tensors: &[GgufEntry]) -> Result<Self> {
        if path.exists() {
            return Err(Error::new(ErrorCode::OutputNotEmpty, "the output file exists")
                .subject(path.display())
                .hint("Choose another name or remove the file"));
        }
        let mut metadata = metadata.clone();
        metadata.set(ALIGNMENT, GgufValue::U32(DEFAULT_ALIGNMENT as u32));
        let mut header = MAGIC.to_vec();
        header.extend(VERSION.to_le_bytes());
        header.extend((tensors.len() as u64).to_le_bytes());
        header.extend((metadata.iter().len() as u64).to_le_bytes());
        for (name, value) in metadata.iter() {
            write_string(name, &mut header);
            header.extend(value.type_id().to_le_bytes());
            value.write(&mut header);
        }
        let mut offset = 0u64;
        let mut lengths = Vec::with_capacity(tensors.len());
        for GgufEntry { name, gguf_type, shape } in tensors {
            let bytes = gguf_type.bytes_of(shape).ok_or_else(|| {
                Error::new(ErrorCode::Internal, format!("{shape:?} cannot be {}", gguf_type.name)).subject(name)
            })?;
            write_string(name, &mut header);
            header.extend((shape.len() as u32).to_le_bytes());
            shape.iter().rev().for_each(|&size| header.extend((size as u64).to_le_bytes()));
            header.extend(gguf_type.id.to_le_bytes());
            header.extend(offset.to_le_bytes());
            offset = (offset + bytes).next_multiple_of(DEFAULT_ALIGNMENT);
            lengths.push(bytes);
        }
        header.resize(header.len().next_multiple_of(DEFAULT_ALIGNMENT as usize), 0);
        let mut name = path.file_name().unwrap_or_default().to_os_string();
        name.push(".partial");
        let temporary = path.with_file_name(name);
        let file = File::create(&temporary).map_err(|error| Error::unwritable(path, &error))?;
        // From here on it removes its file when it is dropped.
        let mut writer = GgufWriter {
            output: Some(BufWriter::with_capacity(BUFFER_BYTES, file)),
            path: path.to_path_buf(),
            temporary,
            left: lengths.into_iter(),
            of_current: 0,
            padding: 0,
            total: header.len() as u64 + offset,
        };
        writer.put(&header)?;
        Ok(writer)
    }

    /// Appends bytes of the tensors; those of one call belong to one tensor.
    ///
    /// # Errors
    /// `ERR_OUTPUT_UNWRITABLE`, `ERR_INTERNAL` for more bytes than the table announces.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        while self.of_current == 0 && !bytes.is_empty() {
            let next = self.left.next().ok_or_else(|| self.wrong("bytes behind the last tensor"))?;
            self.pad()?;
            self.of_current = next;
            self.padding = (next.next_multiple_of(DEFAULT_ALIGNMENT) - next) as usize;
        }
        self.of_current = self
            .of_current
            .checked_sub(bytes.len() as u64)
            .ok_or_else(|| self.wrong("a tensor has more bytes than the table says"))?;
        self.put(bytes)
    }

    /// Brings everything to the disk and gives the file its name: a file of that name is whole. Gives its length.
    ///
    /// # Errors
    /// `ERR_OUTPUT_UNWRITABLE`, `ERR_INTERNAL` when bytes are missing.
    pub fn finish(mut self) -> Result<u64> {
        if self.of_current != 0 || self.left.any(|bytes| bytes != 0) {
            return Err(self.wrong("bytes of tensors were not written"));
        }
        self.pad()?;
        let Some(output) = self.output.take() else { return Ok(self.total) };
        let close = |output: BufWriter<File>| {
            output.into_inner()?.sync_all()?;
            fs::rename(&self.temporary, &self.path)
        };
        close(output).map_err(|error| {
            let _ = fs::remove_file(&self.temporary);
            Error::unwritable(&self.path, &error)
        })?;
        Ok(self.total)
    }

    fn pad(&mut self) -> Result<()> {
        let padding = std::mem::take(&mut self.padding);
        self.put(&[0; DEFAULT_ALIGNMENT as usize][..padding])
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        match &mut self.output {
            Some(output) => output.write_all(bytes).map_err(|error| Error::unwritable(&self.path, &error)),
            None => Ok(()),
        }
    }

    fn wrong(&self, message: &str) -> Error {
        Error::new(ErrorCode::Internal, message).subject(self.path.display())
    }
}

impl Drop for GgufWriter {
    fn drop(&mut self) {
        if self.output.take().is_some() {
            let _ = fs::remove_file(&self.temporary);
        }
    }
}
