use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use kintsugi_runtime::{Error, ErrorCode, Result};
use kintsugi_weights::ElementType;
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo as HeaderEntry};
use serde::{Deserialize, Serialize};

const BUFFER_BYTES: usize = 1 << 20;

/// Writes one safetensors file front to back: the header from a list of tensors, then their bytes in [`file_order`].
///
/// The file begins with `{"__metadata__":{"format":"pt"}, …}` as PyTorch readers want it and holds the same bytes
/// that `safetensors::serialize` would make of the same tensors.
#[derive(Debug)]
pub(crate) struct SafetensorsWriter {
    output: BufWriter<File>,
    /// Where the file will be; until then it has another name.
    path: PathBuf,
    temporary: PathBuf,
    /// Bytes of tensors that are still to come.
    left: u64,
    total: u64,
}

/// What the header says about a tensor.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct TensorHeader {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: u64,
}

/// The order of tensors within a file: widest type first, so that each is aligned to its elements, then by name.
pub(crate) fn file_order(left: &TensorHeader, right: &TensorHeader) -> std::cmp::Ordering {
    right.dtype.cmp(&left.dtype).then_with(|| left.name.cmp(&right.name))
}

impl SafetensorsWriter {
    /// Creates the file and writes the header. `tensors` must be in [`file_order`].
    ///
    /// # Errors
    /// `ERR_OUTPUT_UNWRITABLE` when the system refuses.
    pub(crate) fn create<'a>(path: &Path, tensors: impl Iterator<Item = &'a TensorHeader>) -> Result<Self> {
        Self::described(path, tensors, ("format", "pt"))
    }

    /// As [`SafetensorsWriter::create`], with another string in the header: name and text.
    ///
    /// # Errors
    /// As [`SafetensorsWriter::create`].
    pub(crate) fn described<'a>(
        path: &Path,
        tensors: impl Iterator<Item = &'a TensorHeader>,
        string: (&str, &str),
    ) -> Result<Self> {
        let (header, end) = safetensors_header(tensors, string)
            .map_err(|message| Error::new(ErrorCode::Internal, message).subject(path.display()))?;

        let mut name = path.file_name().unwrap_or_default().to_os_string();
        name.push(".partial");
        let temporary = path.with_file_name(name);
        let write = || {
            let mut output = BufWriter::with_capacity(BUFFER_BYTES, File::create(&temporary)?);
            output.write_all(&(header.len() as u64).to_le_bytes())?;
            output.write_all(&header)?;
            Ok(output)
        };
        let output = write().map_err(|error| Error::unwritable(path, &error))?;
        let total = 8 + header.len() as u64 + end;
        Ok(SafetensorsWriter { output, path: path.to_path_buf(), temporary, left: end, total })
    }

    /// Bytes of the whole file.
    pub(crate) fn total(&self) -> u64 {
        self.total
    }

    /// Appends bytes of the tensors.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.left = self.left.checked_sub(bytes.len() as u64).ok_or_else(|| {
            Error::new(ErrorCode::Internal, "a tensor has more bytes than its header says").subject(self.path.display())
        })?;
        self.output.write_all(bytes).map_err(|error| Error::unwritable(&self.path, &error))
    }

    /// Brings everything to the disk and gives the file its name: a file of that name is whole. Gives its length.
    pub(crate) fn finish(self) -> Result<u64> {
        if self.left != 0 {
            return Err(Error::new(ErrorCode::Internal, format!("{} bytes of tensors were not written", self.left))
                .subject(self.path.display()));
        }
        let close = |output: BufWriter<File>| {
            output.into_inner()?.sync_all()?;
            fs::rename(&self.temporary, &self.path)
        };
        close(self.output).map_err(|error| Error::unwritable(&self.path, &error))?;
        Ok(self.total)
    }
}

/// The header of a file whose tensors lie behind each other in that order, padded so that the tensors are aligned, and
/// the bytes of the tensors. It carries one string only, name and text: the order of several would be random.
pub(crate) fn safetensors_header<'a>(
    tensors: impl Iterator<Item = &'a TensorHeader>,
    (name, text): (&str, &str),
) -> Result<(Vec<u8>, u64), String> {
    let mut end = 0usize;
    let mut entries = Vec::new();
    for TensorHeader { name, dtype, shape, bytes } in tensors {
        let start = end;
        end += *bytes as usize;
        entries.push((name.clone(), HeaderEntry { dtype: *dtype, shape: shape.clone(), data_offsets: (start, end) }));
    }
    let metadata = HashMap::from([(name.to_string(), text.to_string())]);
    let header = Metadata::new(Some(metadata), entries).map_err(|error| error.to_string())?;
    let mut header = serde_json::to_vec(&header).map_err(|error| error.to_string())?;
    header.resize(header.len().next_multiple_of(8), b' ');
    Ok((header, end as u64))
}

/// Writes a small file and brings it to the disk.
pub(crate) fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    let write = || {
        let mut file = File::create(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(|error| Error::unwritable(path, &error))
}

/// The name of `element_type` in safetensors.
pub(crate) fn float_dtype(element_type: ElementType) -> Dtype {
    match element_type {
        ElementType::F32 => Dtype::F32,
        ElementType::F16 => Dtype::F16,
        ElementType::Bf16 => Dtype::BF16,
    }
}

/// `values` in `element_type` as little-endian bytes.
pub(crate) fn float_bytes(values: &[f32], element_type: ElementType) -> Vec<u8> {
    match element_type {
        ElementType::F32 => bytemuck::cast_slice(values).to_vec(),
        ElementType::F16 => {
            let mut narrow = vec![f16::ZERO; values.len()];
            narrow.convert_from_f32_slice(values);
            bytemuck::cast_slice(&narrow).to_vec()
        }
        ElementType::Bf16 => {
            let mut narrow = vec![bf16::ZERO; values.len()];
            narrow.convert_from_f32_slice(values);
            bytemuck::cast_slice(&narrow).to_vec()
        }
    }
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use safetensors::View;

    use super::*;

    struct Plain(Dtype, Vec<usize>, Vec<u8>);

    impl View for &Plain {
        fn dtype(&self) -> Dtype {
            self.0
        }
        fn shape(&self) -> &[usize] {
            &self.1
        }
        fn data(&self) -> Cow<'_, [u8]> {
            (&self.2).into()
        }
        fn data_len(&self) -> usize {
            self.2.len()
        }
    }

    #[test]
    fn bytes_equal_those_of_the_reference_implementation() {
        let tensors = [
            ("b.scale", Plain(Dtype::BF16, vec![3], vec![1, 2, 3, 4, 5, 6])),
            ("b.shape", Plain(Dtype::I64, vec![2], vec![9; 16])),
            ("a.scale", Plain(Dtype::BF16, vec![1, 1], vec![7, 8])),
            ("a.packed", Plain(Dtype::I32, vec![1, 2], (0..8).collect())),
        ];
        let expected = safetensors::serialize(
            tensors.iter().map(|(name, tensor)| (*name, tensor)),
            Some([("format".to_string(), "pt".to_string())].into_iter().collect()),
        )
        .unwrap();

        let mut headers: Vec<TensorHeader> = tensors
            .iter()
            .map(|(name, Plain(dtype, shape, bytes))| TensorHeader {
                name: (*name).to_string(),
                dtype: *dtype,
                shape: shape.clone(),
                bytes: bytes.len() as u64,
            })
            .collect();
        headers.sort_by(file_order);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let mut writer = SafetensorsWriter::create(&path, headers.iter()).unwrap();
        for header in &headers {
            let (_, tensor) = tensors.iter().find(|(name, _)| *name == header.name).unwrap();
            writer.write(&tensor.2).unwrap();
        }
        assert_eq!(writer.finish().unwrap(), expected.len() as u64);
        assert_eq!(std::fs::read(&path).unwrap(), expected);
    }

    #[test]
    fn a_tensor_of_another_length_than_announced_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let header = [TensorHeader { name: "a".into(), dtype: Dtype::U8, shape: vec![4], bytes: 4 }];
        let mut writer = SafetensorsWriter::create(&path, header.iter()).unwrap();
        assert_eq!(writer.write(&[0; 5]).unwrap_err().code, ErrorCode::Internal);
        let mut writer = SafetensorsWriter::create(&path, header.iter()).unwrap();
        writer.write(&[0; 3]).unwrap();
        assert_eq!(writer.finish().unwrap_err().code, ErrorCode::Internal);
    }
}
