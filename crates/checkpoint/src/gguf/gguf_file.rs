use std::collections::BTreeMap;
use std::path::Path;

use kintsugi_runtime::{Error, ErrorCode, Result};
use kintsugi_weights::WeightMatrix;

use super::block_decoder::decode;
use super::header_reader::{HeaderReader, corrupt};
use super::{GgufMetadata, GgufType};
use crate::ByteSource;
use crate::positional_file::PositionalFile;
use crate::safetensors_file::wrong_shape;
use crate::tensor_set::missing_tensor;

/// The first four bytes.
pub(crate) const MAGIC: [u8; 4] = *b"GGUF";
/// The version that is written.
pub(crate) const VERSION: u32 = 3;
/// Where tensors lie when the metadata does not say: at multiples of this.
pub(crate) const DEFAULT_ALIGNMENT: u64 = 32;
/// Name of the metadata value that says otherwise.
pub(crate) const ALIGNMENT: &str = "general.alignment";

/// Longest metadata and tensor table that is read; those with vocabularies of 250k tokens have about 20 MB.
const HEADER_LIMIT: u64 = 256 << 20;
const LARGEST_ALIGNMENT: u64 = 1 << 20;
const MOST_DIMENSIONS: u32 = 4;
const LONGEST_NAME: u64 = 1024;

/// What a GGUF file says about its tensors and itself, read and checked without touching the tensors.
///
/// Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>, versions 2 and 3, little-endian. Accepted are
/// gaps between tensors and bytes behind the last one, as other readers do; refused is every overlap.
#[derive(Clone, Debug)]
pub struct GgufHeader {
    /// The values before the tensor table.
    pub metadata: GgufMetadata,
    /// By name.
    pub tensors: BTreeMap<String, GgufTensor>,
}

/// Where a tensor lies. The sizes have been checked against each other and against the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GgufTensor {
    /// Type of its blocks.
    pub gguf_type: &'static GgufType,
    /// Sizes, outermost first: the file has them the other way round.
    pub shape: Vec<usize>,
    /// From the start of the file.
    pub offset: u64,
    /// Length of the data.
    pub bytes: u64,
}

impl GgufHeader {
    /// Reads and checks the header.
    ///
    /// # Errors
    /// `ERR_CHECKPOINT_CORRUPT` when it breaks the format, `ERR_QUANTIZATION_UNSUPPORTED` for a type of tensors whose
    /// size is not known, `ERR_CHECKPOINT_DTYPE` for a big-endian file or the first version of the format.
    pub fn read(source: &dyn ByteSource) -> Result<Self> {
        let mut reader = HeaderReader::new(source, HEADER_LIMIT);
        let magic: [u8; 4] = reader.array("the magic number")?;
        if magic != MAGIC {
            return Err(reader.corrupt("the file does not begin with 'GGUF'"));
        }
        let version = reader.u32("the version")?;
        if !(2..=VERSION).contains(&version) {
            let message = match version {
                1 => "the file has version 1 of GGUF".to_owned(),
                _ if (1..=VERSION).contains(&version.swap_bytes()) => "the file is big-endian".to_owned(),
                other => format!("the file has version {other} of GGUF"),
            };
            return Err(Error::new(ErrorCode::CheckpointDtype, message)
                .subject(source.name())
                .hint("Versions 2 and 3 are read, little-endian; convert the model again with a present llama.cpp"));
        }
        let tensor_count = reader.u64("the number of tensors")?;
        let value_count = reader.u64("the number of metadata values")?;
        // A name, the number of dimensions, one of them, a type and an offset.
        reader.claim(tensor_count, 8 + 4 + 8 + 4 + 8, "the tensor table")?;
        let metadata = GgufMetadata::read(value_count, &mut reader)?;
        let alignment = metadata.unsigned(ALIGNMENT)?.unwrap_or(DEFAULT_ALIGNMENT);
        if !alignment.is_power_of_two() || alignment > LARGEST_ALIGNMENT {
            return Err(reader.corrupt(format!("tensors cannot be aligned to {alignment} bytes")));
        }
        reader.claim(tensor_count, 8 + 4 + 8 + 4 + 8, "the tensor table")?;
        let mut tensors = BTreeMap::new();
        for _ in 0..tensor_count {
            let (name, tensor) = read_tensor(&mut reader, alignment)?;
            if tensors.contains_key(&name) {
                return Err(reader.corrupt(format!("tensor '{name}' stands there twice")));
            }
            tensors.insert(name, tensor);
        }
        let data_start = reader.position().next_multiple_of(alignment);
        place(&mut tensors, data_start, source)?;
        Ok(GgufHeader { metadata, tensors })
    }
}

/// A row of the tensor table, its offset still relative to the first tensor.
fn read_tensor(reader: &mut HeaderReader<'_>, alignment: u64) -> Result<(String, GgufTensor)> {
    let name = reader.string("the name of a tensor", LONGEST_NAME)?;
    let dimensions = reader.u32("the number of dimensions")?;
    if !(1..=MOST_DIMENSIONS).contains(&dimensions) {
        return Err(reader.corrupt(format!("tensor '{name}' has {dimensions} dimensions")));
    }
    let mut shape = Vec::with_capacity(MOST_DIMENSIONS as usize);
    for _ in 0..dimensions {
        let size = reader.u64("a dimension")?;
        let size = usize::try_from(size).map_err(|_| reader.corrupt(format!("'{name}' is {size} wide")))?;
        shape.push(size);
    }
    shape.reverse();
    let id = reader.u32("the type of a tensor")?;
    let offset = reader.u64("the offset of a tensor")?;
    let gguf_type = GgufType::by_id(id).ok_or_else(|| {
        Error::new(ErrorCode::QuantizationUnsupported, format!("the tensor has type {id} of ggml, which is not known"))
            .subject(&name)
            .hint(GgufType::hint())
    })?;
    let bytes = gguf_type.bytes_of(&shape).ok_or_else(|| {
        let (name_of_type, elements) = (gguf_type.name, gguf_type.block_elements);
        reader.corrupt(format!(
            "tensor '{name}' of {shape:?} cannot be {name_of_type}, which has rows of whole blocks of {elements}"
        ))
    })?;
    if !offset.is_multiple_of(alignment) {
        return Err(reader.corrupt(format!("tensor '{name}' lies at {offset}, not at a multiple of {alignment}")));
    }
    Ok((name, GgufTensor { gguf_type, shape, offset, bytes }))
}

/// Makes offsets absolute and checks that every tensor lies inside of the file and none in another.
fn place(tensors: &mut BTreeMap<String, GgufTensor>, data_start: u64, source: &dyn ByteSource) -> Result<()> {
    let length = source.length();
    for (name, tensor) in tensors.iter_mut() {
        let start = data_start.checked_add(tensor.offset);
        let end = start.and_then(|start| start.checked_add(tensor.bytes));
        let (Some(start), Some(end)) = (start, end) else {
            return Err(corrupt(source, format!("the offset of tensor '{name}' is impossible")));
        };
        if end > length {
            let missing = end - length;
            return Err(corrupt(
                source,
                format!("the file is cut off: tensor '{name}' ends {missing} bytes behind it"),
            ));
        }
        tensor.offset = start;
    }
    let mut order: Vec<(&String, &GgufTensor)> = tensors.iter().filter(|(_, tensor)| tensor.bytes > 0).collect();
    order.sort_by_key(|(_, tensor)| tensor.offset);
    for pair in order.windows(2) {
        let ((first, before), (second, behind)) = (pair[0], pair[1]);
        if before.offset + before.bytes > behind.offset {
            return Err(corrupt(source, format!("tensors '{first}' and '{second}' overlap")));
        }
    }
    Ok(())
}

/// A GGUF file, opened and checked; tensors are read when they are asked for.
#[derive(Debug)]
pub struct GgufFile {
    source: Box<dyn ByteSource>,
    header: GgufHeader,
}

impl GgufFile {
    /// Opens a file.
    ///
    /// # Errors
    /// `ERR_CHECKPOINT_NOT_FOUND`; as [`GgufHeader::read`]; `ERR_CHECKPOINT_SHARD_MISSING` for a part of a model.
    pub fn open(path: &Path) -> Result<Self> {
        let file = PositionalFile::open(path).map_err(|error| {
            Error::io(ErrorCode::CheckpointNotFound, path, &error).hint("Check that the file exists and may be read")
        })?;
        Self::over(Box::new(file))
    }

    /// Over any source of bytes.
    ///
    /// # Errors
    /// As [`GgufFile::open`].
    pub fn over(source: Box<dyn ByteSource>) -> Result<Self> {
        let header = GgufHeader::read(&*source)?;
        if header.metadata.unsigned("split.count")?.is_some_and(|parts| parts > 1) {
            return Err(Error::new(ErrorCode::CheckpointShardMissing, "the file is one of several parts of a model")
                .subject(source.name())
                .hint("Join them first: llama-gguf-split --merge FIRST-PART OUT"));
        }
        Ok(GgufFile { source, header })
    }

    /// The values before the tensor table.
    pub fn metadata(&self) -> &GgufMetadata {
        &self.header.metadata
    }

    /// In name order.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = (&String, &GgufTensor)> {
        self.header.tensors.iter()
    }

    /// The tensor of that name.
    pub fn tensor(&self, name: &str) -> Option<&GgufTensor> {
        self.header.tensors.get(name)
    }

    /// The matrix of that name, as it is stored: floats or codes.
    ///
    /// # Errors
    /// `ERR_CHECKPOINT_TENSOR_MISSING`, `ERR_CHECKPOINT_SHAPE`, `ERR_QUANTIZATION_UNSUPPORTED` for a type that is not
    /// read, `ERR_CHECKPOINT_NOT_FINITE`.
    pub fn matrix(&self, name: &str) -> Result<WeightMatrix> {
        let tensor = self.tensor(name).ok_or_else(|| missing_tensor(name))?;
        let &[rows, columns] = tensor.shape.as_slice() else {
            return Err(wrong_shape(name, &tensor.shape, "[rows, columns]"));
        };
        if rows == 0 || columns == 0 {
            return Err(wrong_shape(name, &tensor.shape, "[rows, columns] without a zero"));
        }
        decode(name, tensor.gguf_type, rows, columns, &self.read_part(tensor, 0, tensor.bytes as usize)?)
    }

    /// `count` bytes of a tensor from its byte `start` on.
    ///
    /// # Errors
    /// `ERR_CHECKPOINT_CORRUPT` when the file has become shorter, `ERR_IO`.
    pub(crate) fn read_part(&self, tensor: &GgufTensor, start: u64, count: usize) -> Result<Vec<u8>> {
        let inside = start.checked_add(count as u64).is_some_and(|end| end <= tensor.bytes);
        if !inside {
            return Err(Error::new(ErrorCode::Internal, "a read behind the end of a tensor"));
        }
        let mut bytes = bytemuck::allocation::try_zeroed_vec(count).map_err(|()| {
            Error::new(ErrorCode::Io, format!("there is no memory for a tensor of {count} bytes"))
                .subject(self.source.name())
                .hint("Use a machine with more memory")
        })?;
        self.source.read_exact_at(&mut bytes, tensor.offset + start)?;
        Ok(bytes)
    }
}
