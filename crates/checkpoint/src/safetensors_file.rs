use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::path::Path;

use bytemuck::Pod;
use half::{bf16, f16};
use kintsugi_runtime::{Error, ErrorCode, Result};
use kintsugi_weights::{DenseMatrix, DenseValues};
use safetensors::Dtype;
use safetensors::tensor::TensorInfo as HeaderEntry;
use serde::Deserialize;
use serde::de::{Error as _, MapAccess, Visitor};

use crate::positional_file::PositionalFile;

/// The length of the header stands in the first eight bytes, little-endian.
const LENGTH_BYTES: u64 = 8;
/// Longest header that the format allows.
const HEADER_LIMIT: u64 = 100_000_000;

const DAMAGED: &str = "The file is damaged; download or copy it again";

/// One safetensors file, opened and checked; tensors are read when they are asked for.
///
/// Format: <https://github.com/huggingface/safetensors#format>. Accepted is what that document allows: tensors lie
/// behind each other without gap or overlap, and the last one ends with the file.
#[derive(Debug)]
pub(crate) struct SafetensorsFile {
    file: PositionalFile,
    tensors: BTreeMap<String, StoredTensor>,
    metadata: BTreeMap<String, String>,
}

/// Where a tensor lies in its file. The sizes have been checked against each other and against the file.
#[derive(Debug, Clone)]
pub(crate) struct StoredTensor {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    /// From the start of the file.
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
}

impl SafetensorsFile {
    /// Reads and checks the header.
    ///
    /// # Errors
    /// `ERR_CHECKPOINT_NOT_FOUND` when the file cannot be opened, `ERR_CHECKPOINT_CORRUPT` when it breaks the format.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let file = PositionalFile::open(path).map_err(|error| {
            Error::io(ErrorCode::CheckpointNotFound, path, &error).hint("Check that the file exists and may be read")
        })?;
        let corrupt = |message: String| corrupt(path, message);
        let behind_length = file.length().checked_sub(LENGTH_BYTES).ok_or_else(|| {
            corrupt(format!("a safetensors file has at least {LENGTH_BYTES} bytes, this one has {}", file.length()))
        })?;
        let mut length = [0; LENGTH_BYTES as usize];
        file.read_exact_at(&mut length, 0)?;
        let length = u64::from_le_bytes(length);
        if length > HEADER_LIMIT {
            return Err(corrupt(format!("the header claims {length} bytes, the format allows {HEADER_LIMIT}")));
        }
        if length > behind_length {
            return Err(corrupt(format!("the header claims {length} bytes, the file has {behind_length} left")));
        }
        let mut header = vec![0; length as usize];
        file.read_exact_at(&mut header, LENGTH_BYTES)?;
        let header =
            std::str::from_utf8(&header).map_err(|error| corrupt(format!("the header is not text: {error}")))?;
        let header: Header =
            serde_json::from_str(header).map_err(|error| corrupt(format!("the header is not valid: {error}")))?;

        let data_start = LENGTH_BYTES + length;
        let (tensors, end) = header.place(data_start).map_err(corrupt)?;
        if end > file.length() {
            let missing = end - file.length();
            return Err(corrupt(format!("the file is cut off: {missing} bytes of its tensors are missing")));
        }
        if end < file.length() {
            let left = file.length() - end;
            return Err(corrupt(format!("{left} bytes follow the last tensor")));
        }
        Ok(SafetensorsFile { file, tensors, metadata: header.metadata })
    }

    /// A file of tensors without a header, which lie where `tensors` says.
    ///
    /// # Errors
    /// `ERR_CHECKPOINT_NOT_FOUND` when the file cannot be opened, `ERR_CHECKPOINT_CORRUPT` when it does not hold them.
    pub(crate) fn without_header(path: &Path, tensors: BTreeMap<String, StoredTensor>) -> Result<Self> {
        let file = PositionalFile::open(path).map_err(|error| {
            Error::io(ErrorCode::CheckpointNotFound, path, &error).hint("Check that the file exists and may be read")
        })?;
        for (name, tensor) in &tensors {
            let whole = stored_bytes(tensor.dtype, &tensor.shape).map(|bytes| bytes as u64) == Some(tensor.bytes);
            let end = tensor.offset.checked_add(tensor.bytes);
            if !whole || end.is_none_or(|end| end > file.length()) {
                return Err(corrupt(path, format!("the file does not hold tensor '{name}'")));
            }
        }
        Ok(SafetensorsFile { file, tensors, metadata: BTreeMap::new() })
    }

    /// The file.
    pub(crate) fn path(&self) -> &Path {
        self.file.path()
    }

    /// In name order.
    pub(crate) fn tensors(&self) -> impl Iterator<Item = (&String, &StoredTensor)> {
        self.tensors.iter()
    }

    /// The tensor of that name.
    pub(crate) fn tensor(&self, name: &str) -> Option<&StoredTensor> {
        self.tensors.get(name)
    }

    /// The strings of `__metadata__`.
    pub(crate) fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Fills `buffer` with the bytes of `tensor` from its byte `start` on.
    pub(crate) fn read_part(&self, tensor: &StoredTensor, start: u64, buffer: &mut [u8]) -> Result<()> {
        self.file.read_exact_at(buffer, tensor.offset + start)
    }

    /// All elements of `tensor`, whose dtype must have the size of `T`.
    pub(crate) fn read_values<T: Pod>(&self, tensor: &StoredTensor) -> Result<Vec<T>> {
        let count = tensor.bytes as usize / size_of::<T>();
        let mut values: Vec<T> = bytemuck::allocation::try_zeroed_vec(count).map_err(|()| {
            Error::new(ErrorCode::Io, format!("there is no memory for a tensor of {} bytes", tensor.bytes))
                .subject(self.path().display())
                .hint("Use a machine with more memory")
        })?;
        self.file.read_exact_at(bytemuck::cast_slice_mut(&mut values), tensor.offset)?;
        Ok(values)
    }

    /// The elements of a float tensor in the type that they are stored in, `ERR_CHECKPOINT_DTYPE` for other types.
    pub(crate) fn read_floats(&self, name: &str, tensor: &StoredTensor) -> Result<DenseValues> {
        Ok(match tensor.dtype {
            Dtype::F32 => DenseValues::F32(self.read_values::<f32>(tensor)?),
            Dtype::F16 => DenseValues::F16(self.read_values::<f16>(tensor)?),
            Dtype::BF16 => DenseValues::Bf16(self.read_values::<bf16>(tensor)?),
            other => {
                return Err(Error::new(
                    ErrorCode::CheckpointDtype,
                    format!("the tensor has type {other}, expected F32, F16 or BF16"),
                )
                .subject(name)
                .hint("Convert the checkpoint to bfloat16"));
            }
        })
    }

    /// A float tensor of two dimensions, `[rows, columns]`, all of it finite.
    ///
    /// # Errors
    /// `ERR_CHECKPOINT_DTYPE`, `ERR_CHECKPOINT_SHAPE`, `ERR_CHECKPOINT_NOT_FINITE` with the name of the tensor.
    pub(crate) fn read_matrix(&self, name: &str, tensor: &StoredTensor) -> Result<DenseMatrix> {
        let &[rows, columns] = tensor.shape.as_slice() else {
            return Err(wrong_shape(name, &tensor.shape, "[rows, columns]"));
        };
        if rows == 0 || columns == 0 {
            return Err(wrong_shape(name, &tensor.shape, "[rows, columns] without a zero"));
        }
        let matrix = DenseMatrix::new(rows, columns, self.read_floats(name, tensor)?);
        match matrix.first_not_finite() {
            Some((row, column)) => Err(not_finite(name, &format!("row {row}, column {column}"))),
            None => Ok(matrix),
        }
    }
}

/// The header as the format defines it, refusing what a plain map would swallow: a name that stands there twice.
struct Header {
    metadata: BTreeMap<String, String>,
    tensors: Vec<(String, HeaderEntry)>,
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct HeaderVisitor;

        impl<'de> Visitor<'de> for HeaderVisitor {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut header = Header { metadata: BTreeMap::new(), tensors: Vec::new() };
                let mut names = HashSet::new();
                while let Some(name) = map.next_key::<String>()? {
                    if !names.insert(name.clone()) {
                        return Err(A::Error::custom(format_args!("'{name}' stands there twice")));
                    }
                    if name == "__metadata__" {
                        header.metadata = map.next_value()?;
                    } else {
                        header.tensors.push((name, map.next_value()?));
                    }
                }
                Ok(header)
            }
        }

        deserializer.deserialize_map(HeaderVisitor)
    }
}

impl Header {
    /// Checks sizes and order of the tensors; gives them with absolute offsets, and the end of the last one.
    fn place(&self, data_start: u64) -> Result<(BTreeMap<String, StoredTensor>, u64), String> {
        let mut order: Vec<&(String, HeaderEntry)> = self.tensors.iter().collect();
        order.sort_by_key(|(_, entry)| entry.data_offsets);
        let mut placed = BTreeMap::new();
        let mut end = 0;
        for (name, entry) in order {
            let (from, to) = entry.data_offsets;
            if to < from {
                return Err(format!("tensor '{name}' ends at byte {to}, before it begins at {from}"));
            }
            if from < end {
                return Err(format!("tensor '{name}' overlaps the one before it by {} bytes", end - from));
            }
            if from > end {
                return Err(format!("{} bytes before tensor '{name}' belong to no tensor", from - end));
            }
            let bytes = stored_bytes(entry.dtype, &entry.shape)
                .ok_or_else(|| format!("the size of tensor '{name}', {:?}, is impossible", entry.shape))?;
            if to - from != bytes {
                let (dtype, shape) = (entry.dtype, &entry.shape);
                return Err(format!("tensor '{name}' of {dtype} {shape:?} needs {bytes} bytes, it has {}", to - from));
            }
            end = to;
            let offset = data_start
                .checked_add(from as u64)
                .ok_or_else(|| format!("the offset of tensor '{name}' is impossible"))?;
            let (dtype, shape) = (entry.dtype, entry.shape.clone());
            placed.insert(name.clone(), StoredTensor { dtype, shape, offset, bytes: bytes as u64 });
        }
        let end = data_start.checked_add(end as u64).ok_or("the offsets of the tensors are impossible")?;
        Ok((placed, end))
    }
}

/// Bytes of a tensor, or `None` when they overflow or are not whole.
fn stored_bytes(dtype: Dtype, shape: &[usize]) -> Option<usize> {
    let elements = shape.iter().try_fold(1usize, |product, &size| product.checked_mul(size))?;
    let bits = elements.checked_mul(dtype.bitsize())?;
    (bits % 8 == 0).then_some(bits / 8)
}

fn corrupt(path: &Path, message: impl Into<String>) -> Error {
    Error::new(ErrorCode::CheckpointCorrupt, message).subject(path.display()).hint(DAMAGED)
}

/// `ERR_CHECKPOINT_SHAPE` for a tensor that has another shape than `expected`.
pub(crate) fn wrong_shape(name: &str, shape: &[usize], expected: &str) -> Error {
    Error::new(ErrorCode::CheckpointShape, format!("the tensor has shape {shape:?}, expected {expected}"))
        .subject(name)
        .hint("config.json and weights may belong to different models; download the folder again")
}

/// `ERR_CHECKPOINT_NOT_FINITE` for a tensor with a NaN or infinity at `place`.
pub(crate) fn not_finite(name: &str, place: &str) -> Error {
    Error::new(ErrorCode::CheckpointNotFinite, format!("the value at {place} is NaN or infinite"))
        .subject(name)
        .hint("The checkpoint is broken; take another copy or an earlier step of the training")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_without_a_header_holds_what_is_said_of_it_or_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("part");
        let values = [1.5f32, -2.0, 3.0, 4.0];
        std::fs::write(&path, [&[9; 3][..], bytemuck::cast_slice(&values)].concat()).unwrap();
        let tensor =
            |dtype, shape: &[usize], offset, bytes| StoredTensor { dtype, shape: shape.to_vec(), offset, bytes };
        let open = |tensors: Vec<(&str, StoredTensor)>| {
            let named = tensors.into_iter().map(|(name, tensor)| (name.to_owned(), tensor));
            SafetensorsFile::without_header(&path, named.collect())
        };
        let file = open(vec![
            ("all", tensor(Dtype::F32, &[2, 2], 3, 16)),
            ("first", tensor(Dtype::U8, &[3], 0, 3)),
            ("last", tensor(Dtype::F32, &[1], 15, 4)),
            ("none", tensor(Dtype::F32, &[0, 7], 19, 0)),
        ])
        .unwrap();
        assert_eq!(file.read_matrix("all", file.tensor("all").unwrap()).unwrap().to_f32(), values);
        assert_eq!(file.read_values::<u8>(file.tensor("first").unwrap()).unwrap(), [9; 3]);
        assert_eq!(file.read_values::<f32>(file.tensor("last").unwrap()).unwrap(), [4.0]);

        for (what, wrong) in [
            ("one byte behind the end", tensor(Dtype::F32, &[2, 2], 4, 16)),
            ("nothing, but behind the end", tensor(Dtype::F32, &[0], 20, 0)),
            ("an end that no number holds", tensor(Dtype::F32, &[1], u64::MAX - 2, 4)),
            ("fewer bytes than elements", tensor(Dtype::F32, &[2, 2], 3, 15)),
            ("more bytes than elements", tensor(Dtype::F32, &[2], 3, 16)),
            ("elements that no number counts", tensor(Dtype::F32, &[usize::MAX, 2], 3, 16)),
        ] {
            // The others are what they should be.
            let error = open(vec![("a", tensor(Dtype::U8, &[3], 0, 3)), ("wrong", wrong)]).unwrap_err();
            assert_eq!(error.code, ErrorCode::CheckpointCorrupt, "{what}");
            assert!(error.message.contains("'wrong'") && error.subject.ends_with("part"), "{what}: {error}");
            assert!(!error.hint.is_empty(), "{what}");
        }
        std::fs::remove_file(&path).unwrap();
        assert_eq!(open(Vec::new()).unwrap_err().code, ErrorCode::CheckpointNotFound);
    }
}
