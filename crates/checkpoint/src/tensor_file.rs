use std::collections::BTreeMap;
use std::path::Path;

use kintsugi_runtime::{Error, ErrorCode, Result, ScratchFile};
use safetensors::Dtype;

use crate::safetensors_file::SafetensorsFile;
use crate::safetensors_writer::{TensorHeader, safetensors_header};

/// A safetensors file of numbers that is no checkpoint: token ids, statistics. Its header is read and checked; numbers
/// are read when they are asked for.
#[derive(Debug)]
pub struct TensorFile {
    file: SafetensorsFile,
}

impl TensorFile {
    /// Opens a file.
    ///
    /// # Errors
    /// `ERR_CHECKPOINT_NOT_FOUND`, `ERR_CHECKPOINT_CORRUPT`.
    pub fn open(path: &Path) -> Result<Self> {
        Ok(TensorFile { file: SafetensorsFile::open(path)? })
    }

    /// The strings of `__metadata__`.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        self.file.metadata()
    }

    /// Sizes of a tensor, outermost first; `None` when there is none of that name.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.file.tensor(name).map(|tensor| tensor.shape.as_slice())
    }

    /// All elements of an i32 or i64 tensor.
    ///
    /// # Errors
    /// `ERR_CHECKPOINT_TENSOR_MISSING`, `ERR_CHECKPOINT_DTYPE`, and what reading reports.
    pub fn integers(&self, name: &str) -> Result<Vec<i64>> {
        let tensor = self.file.tensor(name).ok_or_else(|| self.missing(name))?;
        match tensor.dtype {
            Dtype::I64 => self.file.read_values(tensor),
            Dtype::I32 => Ok(self.file.read_values::<i32>(tensor)?.into_iter().map(i64::from).collect()),
            other => Err(self.wrong_type(name, other, "I32 or I64")),
        }
    }

    /// Fills `out` with elements of an f64 tensor from element `first` on.
    ///
    /// # Errors
    /// `ERR_CHECKPOINT_TENSOR_MISSING`, `ERR_CHECKPOINT_DTYPE`, `ERR_CHECKPOINT_SHAPE` when the tensor has fewer, and
    /// what reading reports.
    pub fn read_f64s(&self, name: &str, first: usize, out: &mut [f64]) -> Result<()> {
        let tensor = self.file.tensor(name).ok_or_else(|| self.missing(name))?;
        if tensor.dtype != Dtype::F64 {
            return Err(self.wrong_type(name, tensor.dtype, "F64"));
        }
        let there = tensor.bytes as usize / 8;
        if first.checked_add(out.len()).is_none_or(|end| end > there) {
            return Err(Error::new(ErrorCode::CheckpointShape, format!("the tensor has only {there} elements"))
                .subject(name)
                .hint("The file belongs to another model"));
        }
        self.file.read_part(tensor, first as u64 * 8, bytemuck::cast_slice_mut(out))
    }

    fn missing(&self, name: &str) -> Error {
        Error::new(
            ErrorCode::CheckpointTensorMissing,
            format!("{} does not hold this tensor", self.file.path().display()),
        )
        .subject(name)
        .hint("The file belongs to another model, or is of another kind")
    }

    fn wrong_type(&self, name: &str, found: Dtype, expected: &str) -> Error {
        Error::new(ErrorCode::CheckpointDtype, format!("the tensor has type {found}, expected {expected}"))
            .subject(name)
            .hint(format!("Store it as {expected}"))
    }
}

/// Writes a safetensors file whose tensors come in any order, each at its place: what is not written is zero.
#[derive(Debug)]
pub struct TensorFileWriter {
    file: ScratchFile,
    offsets: BTreeMap<String, (u64, u64)>,
}

/// The number types that [`TensorFileWriter`] writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NumberType {
    /// binary64
    F64,
    /// 64-bit integers
    I64,
}

impl TensorFileWriter {
    /// The length of the file that `tensors` and the name and text of one string make, without writing it.
    ///
    /// # Errors
    /// `ERR_INTERNAL` for sizes that no file has.
    pub fn length(tensors: &[(String, NumberType, usize)], string: (&str, &str)) -> Result<u64> {
        let (header, end) = Self::layout(tensors, string)?;
        Ok(8 + header.len() as u64 + end)
    }

    /// A new file of vectors with names, types and lengths, under the name `path`, locked until the writer goes. What
    /// was there is lost.
    ///
    /// # Errors
    /// `ERR_OUTPUT_BUSY` while another job writes it, `ERR_OUTPUT_UNWRITABLE`; `ERR_INTERNAL` for sizes that no file has.
    pub fn create(path: &Path, tensors: &[(String, NumberType, usize)], string: (&str, &str)) -> Result<Self> {
        let (start, end) = Self::start(tensors, string)?;
        let file = ScratchFile::exclusive(path)?;
        file.set_length(0)?;
        file.set_length(start.len() as u64 + end)?;
        file.write_at(&start, 0)?;
        Ok(Self::over(file, tensors, start.len() as u64))
    }

    /// The file that an earlier run was writing, with what it holds. `None`, and nothing is touched, when there is none
    /// or it is not the file that [`TensorFileWriter::create`] makes.
    ///
    /// # Errors
    /// As [`TensorFileWriter::create`].
    pub fn resume(path: &Path, tensors: &[(String, NumberType, usize)], string: (&str, &str)) -> Result<Option<Self>> {
        let (start, end) = Self::start(tensors, string)?;
        if !path.is_file() {
            return Ok(None);
        }
        let file = ScratchFile::exclusive(path)?;
        let mut found = vec![0; start.len()];
        let same = file.length()? == start.len() as u64 + end && file.read_at(&mut found, 0).is_ok() && found == start;
        Ok(same.then(|| Self::over(file, tensors, start.len() as u64)))
    }

    fn over(file: ScratchFile, tensors: &[(String, NumberType, usize)], mut offset: u64) -> Self {
        let mut offsets = BTreeMap::new();
        for (name, _, count) in tensors {
            offsets.insert(name.clone(), (offset, *count as u64 * 8));
            offset += *count as u64 * 8;
        }
        TensorFileWriter { file, offsets }
    }

    /// What stands before the numbers, and the bytes of these.
    fn start(tensors: &[(String, NumberType, usize)], string: (&str, &str)) -> Result<(Vec<u8>, u64)> {
        let (header, end) = Self::layout(tensors, string)?;
        Ok(([&(header.len() as u64).to_le_bytes()[..], &header].concat(), end))
    }

    fn layout(tensors: &[(String, NumberType, usize)], string: (&str, &str)) -> Result<(Vec<u8>, u64)> {
        let header = |(name, kind, count): &(String, NumberType, usize)| TensorHeader {
            name: name.clone(),
            dtype: match kind {
                NumberType::F64 => Dtype::F64,
                NumberType::I64 => Dtype::I64,
            },
            shape: vec![*count],
            bytes: *count as u64 * 8,
        };
        let headers: Vec<TensorHeader> = tensors.iter().map(header).collect();
        safetensors_header(headers.iter(), string).map_err(|message| Error::new(ErrorCode::Internal, message))
    }

    /// Writes elements of a tensor, `bytes` in little-endian, from element `first` on.
    ///
    /// # Errors
    /// `ERR_OUTPUT_UNWRITABLE`; `ERR_INTERNAL` for a place that the tensor does not have.
    pub fn write(&self, name: &str, first: usize, bytes: &[u8]) -> Result<()> {
        let (offset, length) = self.offsets.get(name).copied().unwrap_or_default();
        let start = first as u64 * 8;
        if start + bytes.len() as u64 > length {
            return Err(Error::new(ErrorCode::Internal, "a tensor has no such elements").subject(name));
        }
        self.file.write_at(bytes, offset + start)
    }

    /// Returns when what was written is on the disk.
    ///
    /// # Errors
    /// `ERR_OUTPUT_UNWRITABLE`.
    pub fn sync(&self) -> Result<()> {
        self.file.sync()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_come_back_from_their_places_and_a_begun_file_goes_on() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("numbers.safetensors");
        let tensors = [("b".to_owned(), NumberType::F64, 5), ("a".to_owned(), NumberType::I64, 2)];
        let string = ("kind", "test");
        assert!(TensorFileWriter::resume(&path, &tensors, string).unwrap().is_none());
        assert!(!path.exists(), "asking leaves nothing");
        let writer = TensorFileWriter::create(&path, &tensors, string).unwrap();
        writer.write("b", 3, bytemuck::cast_slice(&[1.5f64, -2.5])).unwrap();
        assert_eq!(writer.write("b", 4, &[0; 16]).unwrap_err().code, ErrorCode::Internal);
        for busy in [
            TensorFileWriter::create(&path, &tensors, string).map(|_| ()),
            TensorFileWriter::resume(&path, &tensors, string).map(|_| ()),
        ] {
            assert_eq!(busy.unwrap_err().code, ErrorCode::OutputBusy);
        }
        drop(writer);
        let writer = TensorFileWriter::resume(&path, &tensors, string).unwrap().unwrap();
        writer.write("a", 0, bytemuck::cast_slice(&[7i64, -8])).unwrap();
        writer.sync().unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().len(), TensorFileWriter::length(&tensors, string).unwrap());

        let file = TensorFile::open(&path).unwrap();
        assert_eq!((file.metadata()["kind"].as_str(), file.shape("b")), ("test", Some(&[5][..])));
        assert_eq!(file.integers("a").unwrap(), [7, -8]);
        let mut values = [9.0; 4];
        file.read_f64s("b", 1, &mut values).unwrap();
        assert_eq!(values, [0.0, 0.0, 1.5, -2.5]);
        assert_eq!(file.read_f64s("b", 2, &mut values).unwrap_err().code, ErrorCode::CheckpointShape);
        assert_eq!(file.read_f64s("a", 0, &mut values[..1]).unwrap_err().code, ErrorCode::CheckpointDtype);
        assert_eq!(file.integers("b").unwrap_err().code, ErrorCode::CheckpointDtype);
        assert_eq!(file.integers("c").unwrap_err().code, ErrorCode::CheckpointTensorMissing);

        drop(writer);
        assert!(TensorFileWriter::resume(&path, &tensors, ("kind", "other")).unwrap().is_none());
        assert_eq!(TensorFile::open(&path).unwrap().integers("a").unwrap(), [7, -8], "nothing is touched");
        drop(TensorFileWriter::create(&path, &tensors, string).unwrap());
        assert_eq!(TensorFile::open(&path).unwrap().integers("a").unwrap(), [0, 0], "begun anew");
    }
}
