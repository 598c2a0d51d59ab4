use std::collections::BTreeMap;
use std::path::Path;

use half::{bf16, f16};
use kintsugi_runtime::{Error, ErrorCode, Result};
use kintsugi_weights::{DenseMatrix, DenseValues, ElementType};

use crate::positional_file::PositionalFile;
use crate::torch_pickle::{TorchTensor, read_state_dict};

/// How many times as large as the file all tensors may be, where they share their storage.
const SHARED_TIMES: u64 = 8;
/// Largest `data.pkl` that is read; it holds names and shapes only, some 250 bytes per tensor. A byte may become tens of
/// bytes of values.
const PICKLE_LIMIT: u64 = 8 << 20;
/// Largest central directory that is read.
const DIRECTORY_LIMIT: u64 = 64 << 20;
/// The end record and the longest comment behind it.
const END_LIMIT: u64 = 22 + 65_535;

const SAVE_AGAIN: &str = "Save the adapter again with PEFT, which writes safetensors";

/// An `adapter_model.bin`: the zip archive that `torch.save` writes, read without running what its pickle says.
///
/// The archive holds `NAME/data.pkl` with names, types and shapes, and one file of raw numbers per storage. Format:
/// `torch/serialization.py` and APPNOTE.TXT of PKWARE; entries must be stored, not compressed, as torch stores them.
#[derive(Debug)]
pub(crate) struct TorchArchive {
    file: PositionalFile,
    tensors: BTreeMap<String, TorchTensor>,
    entries: BTreeMap<String, Entry>,
    /// The folder inside of the archive that everything lies in, with its slash.
    root: String,
}

/// A stored file of the archive.
#[derive(Clone, Copy, Debug)]
struct Entry {
    /// Of its local header.
    header: u64,
    bytes: u64,
    checksum: u32,
}

impl TorchArchive {
    /// Reads directory and pickle.
    ///
    /// # Errors
    /// `ERR_ADAPTER_INVALID` when the file is not such an archive or is damaged.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let file = PositionalFile::open(path)
            .map_err(|error| invalid(path.display(), format!("the file cannot be read: {error}")))?;
        let entries = read_directory(&file)?;
        let pickle = entries
            .keys()
            .find(|name| name.strip_suffix("data.pkl").is_some_and(|root| root.ends_with('/')))
            .cloned()
            .ok_or_else(|| invalid(path.display(), "the archive holds no data.pkl".into()))?;
        let root = pickle.trim_end_matches("data.pkl").to_string();
        let mut archive = TorchArchive { file, tensors: BTreeMap::new(), entries, root };
        if archive.entries.contains_key(&format!("{}byteorder", archive.root))
            && archive.read_entry(&format!("{}byteorder", archive.root), 16)? != b"little"
        {
            return Err(invalid(path.display(), "the numbers are big-endian".into()));
        }
        let pickle = archive.read_entry(&pickle, PICKLE_LIMIT)?;
        archive.tensors =
            read_state_dict(&pickle).map_err(|message| invalid(path.display(), format!("data.pkl: {message}")))?;
        let mut bytes = 0u64;
        for (name, tensor) in &archive.tensors {
            bytes = bytes.saturating_add(archive.check(name, tensor)?);
        }
        // A few bytes of pickle make another tensor of a storage that is there. Some Linears do share one.
        if bytes > archive.file.length().saturating_mul(SHARED_TIMES) {
            return Err(invalid(path.display(), "tensors share their storage and are larger than the file".into()));
        }
        Ok(archive)
    }

    /// Name, shape and type of each tensor, in name order.
    pub(crate) fn tensors(&self) -> impl Iterator<Item = (&str, &[usize], ElementType)> {
        self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor.shape.as_slice(), tensor.element_type))
    }

    /// A tensor of two dimensions, all of it finite.
    ///
    /// # Errors
    /// `ERR_ADAPTER_INVALID`; `ERR_IO` when the system refuses.
    pub(crate) fn matrix(&self, name: &str) -> Result<DenseMatrix> {
        let tensor = self.tensors.get(name).ok_or_else(|| invalid(name, "the tensor is missing".into()))?;
        let &[rows, columns] = tensor.shape.as_slice() else {
            return Err(invalid(name, format!("the tensor has {} dimensions, expected 2", tensor.shape.len())));
        };
        let storage = self.read_entry(&self.storage(tensor), u64::MAX)?;
        let width = tensor.element_type.bits() / 8;
        let bytes = &storage[tensor.offset * width..(tensor.offset + rows * columns) * width];
        let halves = || bytes.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]]));
        let values = match tensor.element_type {
            ElementType::F32 => DenseValues::F32(
                bytes.chunks_exact(4).map(|word| f32::from_le_bytes([word[0], word[1], word[2], word[3]])).collect(),
            ),
            ElementType::F16 => DenseValues::F16(halves().map(f16::from_bits).collect()),
            ElementType::Bf16 => DenseValues::Bf16(halves().map(bf16::from_bits).collect()),
        };
        let matrix = DenseMatrix::new(rows, columns, values);
        match matrix.first_not_finite() {
            Some((row, column)) => {
                Err(invalid(name, format!("the value in row {row}, column {column} is NaN or infinite")))
            }
            None => Ok(matrix),
        }
    }

    fn storage(&self, tensor: &TorchTensor) -> String {
        format!("{}data/{}", self.root, tensor.storage)
    }

    /// Whether the tensor is row-major, not empty, and inside of its storage. Gives its bytes.
    fn check(&self, name: &str, tensor: &TorchTensor) -> Result<u64> {
        let mut stride = 1usize;
        for (&size, &found) in tensor.shape.iter().zip(&tensor.strides).rev() {
            if size == 0 {
                return Err(invalid(name, "the tensor is empty".into()));
            }
            if size > 1 && found != stride {
                return Err(invalid(name, "the tensor is not stored row after row".into()));
            }
            stride = stride.checked_mul(size).ok_or_else(|| invalid(name, "the shape is too large".into()))?;
        }
        let width = tensor.element_type.bits() / 8;
        let end = tensor.offset.checked_add(stride).and_then(|end| end.checked_mul(width));
        let stored = self.entries.get(&self.storage(tensor)).map(|entry| entry.bytes);
        match (end, stored) {
            (_, None) => Err(invalid(name, format!("the archive lacks the storage {}", tensor.storage))),
            (Some(end), Some(bytes)) if end as u64 <= bytes => Ok((stride * width) as u64),
            _ => Err(invalid(name, "the tensor reaches beyond its storage".into())),
        }
    }

    fn read_entry(&self, name: &str, limit: u64) -> Result<Vec<u8>> {
        let damaged = |message: &str| invalid(self.file.path().display(), format!("{name}: {message}"));
        let entry = self.entries.get(name).ok_or_else(|| damaged("the archive lacks it"))?;
        if entry.bytes > limit || entry.bytes > self.file.length() {
            return Err(damaged("it is larger than such a file can be"));
        }
        // The local header repeats the name and may have another extra field than the directory.
        let mut header = [0; 30];
        self.read(&mut header, entry.header)?;
        if header[..4] != *b"PK\x03\x04" {
            return Err(damaged("its header is damaged"));
        }
        let start = entry.header + 30 + u64::from(u16_at(&header, 26)) + u64::from(u16_at(&header, 28));
        if start.checked_add(entry.bytes).is_none_or(|end| end > self.file.length()) {
            return Err(damaged("the file is cut off"));
        }
        let mut bytes = vec![0; entry.bytes as usize];
        self.read(&mut bytes, start)?;
        if crc32(&bytes) != entry.checksum {
            return Err(damaged("the checksum does not fit"));
        }
        Ok(bytes)
    }

    fn read(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        read(&self.file, buffer, offset)
    }
}

fn read(file: &PositionalFile, buffer: &mut [u8], offset: u64) -> Result<()> {
    if offset.checked_add(buffer.len() as u64).is_none_or(|end| end > file.length()) {
        return Err(invalid(file.path().display(), "the file is cut off".into()));
    }
    file.read_exact_at(buffer, offset).map_err(|error| match error.code {
        ErrorCode::Io => error,
        _ => invalid(file.path().display(), "the file is cut off".into()),
    })
}

/// The entries of the central directory.
fn read_directory(file: &PositionalFile) -> Result<BTreeMap<String, Entry>> {
    let damaged = |message: &str| invalid(file.path().display(), message.to_string());
    let tail_start = file.length().saturating_sub(END_LIMIT);
    let mut tail = vec![0; (file.length() - tail_start) as usize];
    read(file, &mut tail, tail_start)?;
    let end = (0..tail.len().saturating_sub(21))
        .rev()
        .find(|&at| tail[at..at + 4] == *b"PK\x05\x06")
        .ok_or_else(|| damaged("the file is not an archive of torch.save; files of torch before 1.6 are not read"))?;
    let end = &tail[end..];
    let (mut count, mut size, mut start) =
        (u64::from(u16_at(end, 10)), u64::from(u32_at(end, 12)), u64::from(u32_at(end, 16)));
    if let Some(record) = zip64_end(file, &tail)? {
        (count, size, start) = record;
    }
    if size > DIRECTORY_LIMIT || start.checked_add(size).is_none_or(|end| end > file.length()) {
        return Err(damaged("the directory of the archive lies outside of the file"));
    }
    let mut directory = vec![0; size as usize];
    read(file, &mut directory, start)?;
    let mut entries = BTreeMap::new();
    let mut left = directory.as_slice();
    for _ in 0..count {
        let (name, entry, rest) =
            directory_entry(left).ok_or_else(|| damaged("the directory of the archive is damaged"))?;
        let entry =
            entry.ok_or_else(|| damaged("the archive is compressed or encrypted, which torch.save never does"))?;
        left = rest;
        if entries.insert(name, entry).is_some() {
            return Err(damaged("the archive holds two files of one name"));
        }
    }
    Ok(entries)
}

/// Count, size and start of the directory from the zip64 record, where there is one.
fn zip64_end(file: &PositionalFile, tail: &[u8]) -> Result<Option<(u64, u64, u64)>> {
    let Some(at) = (0..tail.len().saturating_sub(19)).rev().find(|&at| tail[at..at + 4] == *b"PK\x06\x07") else {
        return Ok(None);
    };
    let mut record = [0; 56];
    read(file, &mut record, u64_at(&tail[at..], 8))?;
    if record[..4] != *b"PK\x06\x06" {
        return Err(invalid(file.path().display(), "the end of the archive is damaged".into()));
    }
    Ok(Some((u64_at(&record, 32), u64_at(&record, 40), u64_at(&record, 48))))
}

/// Name and place of the first entry of a directory, and what follows. The place is `None` for what is not just stored.
fn directory_entry(bytes: &[u8]) -> Option<(String, Option<Entry>, &[u8])> {
    let header = bytes.get(..46)?;
    if header[..4] != *b"PK\x01\x02" {
        return None;
    }
    let (name_length, extra_length, comment) =
        (u16_at(header, 28) as usize, u16_at(header, 30) as usize, u16_at(header, 32) as usize);
    let name = String::from_utf8(bytes.get(46..46 + name_length)?.to_vec()).ok()?;
    let mut extra = bytes.get(46 + name_length..46 + name_length + extra_length)?;
    let rest = bytes.get(46 + name_length + extra_length + comment..)?;
    let (flags, method) = (u16_at(header, 8), u16_at(header, 10));
    let (mut packed, mut plain, mut offset) =
        (u64::from(u32_at(header, 20)), u64::from(u32_at(header, 24)), u64::from(u32_at(header, 42)));
    while extra.len() >= 4 {
        let (kind, length) = (u16_at(extra, 0), u16_at(extra, 2) as usize);
        let mut field = extra.get(4..4 + length)?;
        if kind == 1 {
            // Zip64: only the fields that do not fit into the entry, in this order.
            for value in [&mut plain, &mut packed, &mut offset] {
                if *value == u64::from(u32::MAX) {
                    *value = u64_at(field.get(..8)?, 0);
                    field = &field[8..];
                }
            }
        }
        extra = &extra[4 + length..];
    }
    let stored = method == 0 && flags & 1 == 0 && packed == plain;
    Some((name, stored.then_some(Entry { header: offset, bytes: plain, checksum: u32_at(header, 16) }), rest))
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

/// The checksum of zip files (ISO 3309).
fn crc32(bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut i = 0;
        while i < 256 {
            let mut value = i as u32;
            let mut bit = 0;
            while bit < 8 {
                value = if value & 1 == 1 { 0xedb8_8320 ^ value >> 1 } else { value >> 1 };
                bit += 1;
            }
            table[i] = value;
            i += 1;
        }
        table
    };
    !bytes.iter().fold(!0, |sum: u32, &byte| TABLE[((sum ^ u32::from(byte)) & 0xff) as usize] ^ sum >> 8)
}

fn invalid(subject: impl std::fmt::Display, message: String) -> Error {
    Error::new(ErrorCode::AdapterInvalid, message).subject(subject).hint(SAVE_AGAIN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_that_of_the_standard() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
    }
}
