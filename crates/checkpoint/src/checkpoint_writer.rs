use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use kintsugi_runtime::{Error, ErrorCode, Result, StagedFolder};
use kintsugi_weights::{Adapter, ElementType, QuantizedMatrix};
use safetensors::Dtype;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::companion_files::copy_companions;
use crate::float8_scaling::Float8Scaling;
use crate::safetensors_writer::{float_bytes, float_dtype, write_synced};
use crate::staged_parts::{PartRecord, StagedParts};
use crate::tensor_set::missing_tensor;
use crate::{Checkpoint, LinearFormat, MatrixForm, PackQuantized, QuantizationConfig, Scheme, write_adapter};

/// Bytes that are copied or changed at a time.
pub(crate) const COPY_BUFFER: usize = 4 << 20;

/// Writes a compressed checkpoint into `OUT.partial`, which becomes `OUT` when it is whole.
///
/// Tensors come in any order and leave memory at once: those of a unit (a decoder block) go to a part file, and
/// [`CheckpointWriter::seal`] merges the parts by streaming copies; [`CheckpointWriter::commit`] gives the folder its
/// name. Same calls, same bytes. Dropped before `commit` succeeded, the writer removes everything that it wrote, unless
/// [`CheckpointWriter::keep`] said that a later run will [`CheckpointWriter::resume`].
#[derive(Debug)]
pub struct CheckpointWriter {
    // Before `staged`, so that the open file is closed when the folder is removed.
    parts: StagedParts,
    staged: StagedFolder,
    source: Checkpoint,
    target_name: String,
    format: &'static dyn LinearFormat,
    /// The matrices written so far, each with the index of its part.
    linears: BTreeMap<String, (Scheme, usize)>,
    /// The type that `config.json` will name; `None` for that of the source.
    element_type: Option<ElementType>,
}

/// What a finished unit put into its part file: all that a later run needs to go on behind it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct UnitRecord {
    #[serde(flatten)]
    part: PartRecord,
    linears: BTreeMap<String, Scheme>,
}

impl CheckpointWriter {
    /// Starts a checkpoint at `target` that takes configuration, tokenizer and uncompressed tensors from `source`.
    ///
    /// # Errors
    /// `ERR_OUTPUT_NOT_EMPTY`, `ERR_OUTPUT_UNWRITABLE`.
    pub fn create(target: &Path, source: &Checkpoint) -> Result<Self> {
        Ok(Self::over(StagedFolder::create(target)?, target, source))
    }

    /// Goes on where an earlier writer of `target` was when it had finished `units`. `None` when the folder it kept is
    /// not there or lacks a part.
    ///
    /// # Errors
    /// `ERR_OUTPUT_NOT_EMPTY`, `ERR_OUTPUT_UNWRITABLE`.
    pub fn resume(target: &Path, source: &Checkpoint, units: &[UnitRecord]) -> Result<Option<Self>> {
        let Some(staged) = StagedFolder::reopen(target)? else { return Ok(None) };
        let mut writer = Self::over(staged, target, source);
        for (part, unit) in units.iter().enumerate() {
            writer.parts.resume(&unit.part);
            for (name, scheme) in &unit.linears {
                writer.linears.insert(name.clone(), (*scheme, part));
            }
        }
        Ok(writer.parts.are_whole(units.iter().map(|unit| &unit.part)).then_some(writer))
    }

    fn over(staged: StagedFolder, target: &Path, source: &Checkpoint) -> Self {
        CheckpointWriter {
            parts: StagedParts::new(staged.path()),
            staged,
            source: source.clone(),
            target_name: target.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            format: &PackQuantized,
            linears: BTreeMap::new(),
            element_type: None,
        }
    }

    /// Leaves what was written when this is dropped, for a later [`CheckpointWriter::resume`].
    pub fn keep(&mut self) {
        self.staged.keep();
    }

    /// Cuts the weights into files with at most `bytes` bytes of tensors each instead of 5 GB. A larger tensor gets a
    /// file of its own.
    #[must_use]
    pub fn shard_bytes(mut self, bytes: u64) -> Self {
        self.parts.shard_bytes = bytes;
        self
    }

    /// Lets `config.json` name this type of the weights instead of that of the source.
    #[must_use]
    pub fn element_type(mut self, element_type: Option<ElementType>) -> Self {
        self.element_type = element_type;
        self
    }

    /// Lays quantized Linears out in `format` instead of compressed-tensors `pack-quantized`.
    #[must_use]
    pub fn format(mut self, format: &'static dyn LinearFormat) -> Self {
        self.format = format;
        self
    }

    /// Removes what was written when this is dropped, kept before or not.
    pub fn discard(&mut self) {
        self.staged.discard();
    }

    /// The configuration that describes the matrices written so far; `None` when there are none.
    pub fn quantization(&self, ignore: Vec<String>) -> Option<QuantizationConfig> {
        let linears = self.linears.iter().map(|(name, (scheme, _))| (name.clone(), *scheme)).collect();
        QuantizationConfig::describing(self.format, &linears, ignore)
    }

    /// The folder that will become the target, for files that the caller adds.
    pub fn folder(&self) -> &Path {
        self.staged.path()
    }

    /// Writes the tensors of a quantized Linear (not its bias, which is copied). Gives their bytes.
    ///
    /// # Errors
    /// `ERR_OUTPUT_UNWRITABLE`, `ERR_SHAPE_MISMATCH` for a matrix without rows or columns,
    /// `ERR_QUANTIZATION_UNSUPPORTED` for one that the format cannot hold; `ERR_INTERNAL` when the Linear was written
    /// before.
    pub fn write_linear(&mut self, name: &str, matrix: &QuantizedMatrix) -> Result<u64> {
        if matrix.codes().is_empty() {
            return Err(Error::new(ErrorCode::ShapeMismatch, "a matrix without rows or columns cannot be stored")
                .subject(name)
                .hint("Leave the Linear out"));
        }
        MatrixForm::of(matrix).check(self.format).map_err(|error| error.subject(name))?;
        let mut total = 0;
        self.format.encode(matrix, &mut |tensor| {
            let bytes = tensor.bytes.len() as u64;
            self.parts.begin_tensor(&format!("{name}.{}", tensor.suffix), tensor.dtype, tensor.shape, bytes)?;
            self.parts.append(tensor.bytes)?;
            total += bytes;
            Ok(())
        })?;
        self.linears.insert(name.to_owned(), (Scheme::of(matrix), self.parts.current()));
        Ok(total)
    }

    /// Copies a tensor of the source as it is. Gives its bytes.
    ///
    /// # Errors
    /// `ERR_CHECKPOINT_TENSOR_MISSING`, `ERR_CHECKPOINT_CORRUPT` when the source shrinks,
    /// `ERR_QUANTIZATION_UNSUPPORTED` for 8-bit floats, whose scales are told by a configuration that stays behind,
    /// `ERR_OUTPUT_UNWRITABLE`; `ERR_INTERNAL` when the tensor was written before.
    pub fn copy(&mut self, tensor: &str) -> Result<u64> {
        let source = self.source.clone();
        if let Some(gguf) = source.gguf() {
            let (kind, shape, bytes) = gguf.plain(tensor)?;
            self.parts.begin_tensor(tensor, float_dtype(kind), shape, bytes.len() as u64)?;
            self.parts.append(&bytes)?;
            return Ok(bytes.len() as u64);
        }
        let (file, stored) = source.stored(tensor)?;
        if stored.dtype == Dtype::F8_E4M3 {
            return Err(Float8Scaling::refuse_copy(tensor));
        }
        self.parts.begin_tensor(tensor, stored.dtype, stored.shape.clone(), stored.bytes)?;
        let mut buffer = vec![0; COPY_BUFFER.min(stored.bytes as usize)];
        let mut done = 0;
        while done < stored.bytes {
            let count = buffer.len().min((stored.bytes - done) as usize);
            file.read_part(stored, done, &mut buffer[..count])?;
            self.parts.append(&buffer[..count])?;
            done += count as u64;
        }
        Ok(stored.bytes)
    }

    /// Writes other values for a float tensor of the source, in its type and shape. Gives its bytes.
    ///
    /// # Errors
    /// `ERR_CHECKPOINT_TENSOR_MISSING`, `ERR_CHECKPOINT_DTYPE` for a tensor that is not of floats, `ERR_SHAPE_MISMATCH`
    /// for another number of values, `ERR_OUTPUT_UNWRITABLE`; `ERR_INTERNAL` when the tensor was written before.
    pub fn rewrite(&mut self, tensor: &str, values: &[f32]) -> Result<u64> {
        let source = self.source.clone();
        let stored = source.tensor(tensor).ok_or_else(|| missing_tensor(tensor))?;
        let shape = stored.shape.clone();
        if shape.iter().product::<usize>() != values.len() {
            let message = format!("{} values for a tensor of shape {shape:?}", values.len());
            return Err(Error::new(ErrorCode::ShapeMismatch, message).subject(tensor));
        }
        let kinds = [ElementType::F32, ElementType::F16, ElementType::Bf16];
        let Some(kind) = kinds.into_iter().find(|&kind| float_dtype(kind).to_string() == stored.dtype) else {
            let message = format!("the tensor has type {}, expected floats", stored.dtype);
            return Err(Error::new(ErrorCode::CheckpointDtype, message).subject(tensor));
        };
        let bytes = float_bytes(values, kind);
        self.parts.begin_tensor(tensor, float_dtype(kind), shape, bytes.len() as u64)?;
        self.parts.append(&bytes)?;
        Ok(bytes.len() as u64)
    }

    /// Writes a float tensor that the source does not have in this form; values are rounded to `element`. Gives its
    /// bytes.
    ///
    /// # Errors
    /// `ERR_SHAPE_MISMATCH` for another number of values, `ERR_OUTPUT_UNWRITABLE`; `ERR_INTERNAL` when the tensor was
    /// written before.
    pub fn write_dense(&mut self, tensor: &str, shape: &[usize], values: &[f32], element: ElementType) -> Result<u64> {
        if shape.iter().product::<usize>() != values.len() {
            let message = format!("{} values for a tensor of shape {shape:?}", values.len());
            return Err(Error::new(ErrorCode::ShapeMismatch, message).subject(tensor));
        }
        let bytes = float_bytes(values, element);
        self.parts.begin_tensor(tensor, float_dtype(element), shape.to_vec(), bytes.len() as u64)?;
        self.parts.append(&bytes)?;
        Ok(bytes.len() as u64)
    }

    /// Writes a float tensor of the source in another type, or its own, with `change` applied to bands of its rows: it
    /// gets the number of the first row and the values of some rows as f32, which are rounded once. Memory is taken for
    /// a band at a time. Gives its bytes.
    ///
    /// # Errors
    /// `ERR_CHECKPOINT_TENSOR_MISSING`, `ERR_CHECKPOINT_DTYPE` for a tensor that is not of floats,
    /// `ERR_VALUE_NOT_FINITE` when a value is NaN or infinite as it would be written, `ERR_OUTPUT_UNWRITABLE`, and what `change` reports; `ERR_INTERNAL` when the tensor was written before.
    pub fn transform(
        &mut self,
        tensor: &str,
        element_type: Option<ElementType>,
        mut change: impl FnMut(usize, &mut [f32]) -> Result<()>,
    ) -> Result<u64> {
        let source = self.source.clone();
        let (file, stored) = source.stored(tensor)?;
        let Some(from) = ElementType::ALL.into_iter().find(|&kind| float_dtype(kind) == stored.dtype) else {
            let message = format!("the tensor has type {}, expected floats", stored.dtype);
            return Err(Error::new(ErrorCode::CheckpointDtype, message)
                .subject(tensor)
                .hint("Start from the unquantized checkpoint"));
        };
        let to = element_type.unwrap_or(from);
        let width = from.bits() / 8;
        let values = stored.bytes as usize / width;
        let row = stored.shape.iter().skip(1).product::<usize>().max(1);
        let bytes = (values * to.bits() / 8) as u64;
        self.parts.begin_tensor(tensor, float_dtype(to), stored.shape.clone(), bytes)?;
        let band = (COPY_BUFFER / (row * width)).max(1) * row;
        for start in (0..values).step_by(band) {
            let count = band.min(values - start);
            let mut raw = vec![0; count * width];
            file.read_part(stored, (start * width) as u64, &mut raw)?;
            let mut part = from.widen(&raw);
            change(start / row, &mut part)?;
            let written = float_bytes(&part, to);
            // Rounding to a narrower type makes infinities of its own.
            if to.first_not_finite(&written).is_some() {
                let message = match part.iter().all(|value| value.is_finite()) {
                    true => format!("the tensor has values that {} cannot hold", to.name()),
                    false => "the tensor has values that are NaN or infinite".to_string(),
                };
                return Err(Error::new(ErrorCode::ValueNotFinite, message)
                    .subject(tensor)
                    .hint("Write it as bf16 or f32, or check where the values come from"));
            }
            self.parts.append(&written)?;
        }
        Ok(bytes)
    }

    /// Closes the part file of a unit: what was written until now is on the disk. Gives what it holds, `None` when
    /// nothing was written.
    ///
    /// # Errors
    /// `ERR_OUTPUT_UNWRITABLE`.
    pub fn end_unit(&mut self) -> Result<Option<UnitRecord>> {
        let index = self.parts.current();
        let Some(part) = self.parts.close()? else { return Ok(None) };
        let of_part = self.linears.iter().filter(|(_, (_, part))| *part == index);
        let linears = of_part.map(|(name, (scheme, _))| (name.clone(), *scheme)).collect();
        Ok(Some(UnitRecord { part, linears }))
    }

    /// Writes the PEFT folder `eora/`. Gives its bytes; 0 and no folder when there are no factors.
    ///
    /// # Errors
    /// `ERR_ADAPTER_INVALID`, `ERR_OUTPUT_UNWRITABLE`.
    pub fn write_compensation(&mut self, adapter: &Adapter) -> Result<u64> {
        if adapter.linears.is_empty() || self.has_compensation() {
            return Ok(0);
        }
        let folder = self.folder().join(Checkpoint::COMPENSATION_FOLDER);
        write_adapter(&folder, adapter, adapter.base_model.as_deref().unwrap_or(&self.target_name))?;
        folder_bytes(&folder)
    }

    /// Whether the PEFT folder is written.
    pub fn has_compensation(&self) -> bool {
        self.folder().join(Checkpoint::COMPENSATION_FOLDER).is_dir()
    }

    /// Merges the parts, writes `config.json` and the companions of the source, and checks that the folder opens
    /// again. Gives the bytes of the whole folder. Afterwards only files beside the checkpoint may be added, in
    /// [`CheckpointWriter::folder`].
    ///
    /// Interrupted, it may be called again on a resumed writer. The weights become `model.safetensors`, or shards with an index when they are larger than one file may be.
    /// Without a quantized Linear `config.json` says nothing about quantization.
    ///
    /// # Errors
    /// `ERR_OUTPUT_UNWRITABLE`; `ERR_QUANTIZATION_UNSUPPORTED` when `quantization` does not describe every matrix that
    /// was written, or cannot be said in its format.
    pub fn seal(&mut self, quantization: &QuantizationConfig) -> Result<u64> {
        self.seal_as(Some(quantization))
    }

    /// As [`CheckpointWriter::seal`], for a checkpoint without a quantized Linear.
    ///
    /// # Errors
    /// `ERR_OUTPUT_UNWRITABLE`; `ERR_INTERNAL` when a quantized Linear was written.
    pub fn seal_plain(&mut self) -> Result<u64> {
        self.seal_as(None)
    }

    fn seal_as(&mut self, quantization: Option<&QuantizationConfig>) -> Result<u64> {
        self.end_unit()?;
        match quantization {
            Some(quantization) => self.check_schemes(quantization)?,
            None if self.linears.is_empty() => {}
            None => return Err(Error::new(ErrorCode::Internal, "a quantized Linear needs a configuration")),
        }
        self.parts.merge()?;
        copy_companions(&self.source, self.folder())?;

        write_json(&self.folder().join("config.json"), self.config(quantization)?)?;

        Checkpoint::open(self.folder())?;
        self.bytes()
    }

    /// What was written in the units that have ended, as the checkpoint that it will be: to be read until
    /// [`CheckpointWriter::seal`] merges the parts, and to be dropped before.
    ///
    /// # Errors
    /// Those of [`Checkpoint::open`]; `ERR_QUANTIZATION_UNSUPPORTED` as in [`CheckpointWriter::seal`].
    pub fn staged(&self, quantization: &QuantizationConfig) -> Result<Checkpoint> {
        self.check_schemes(quantization)?;
        Checkpoint::of_tensors(self.folder(), self.config(Some(quantization))?, self.parts.tensors()?)
    }

    /// What `config.json` will say.
    fn config(&self, quantization: Option<&QuantizationConfig>) -> Result<Map<String, Value>> {
        let mut config = self.source.config().clone();
        for field in Checkpoint::QUANTIZATION_FIELDS {
            config.shift_remove(field);
        }
        if let Some(element_type) = self.element_type {
            let name = match element_type {
                ElementType::F32 => "float32",
                ElementType::F16 => "float16",
                ElementType::Bf16 => "bfloat16",
            };
            for field in ["torch_dtype", "dtype"] {
                if let Some(value) = config.get_mut(field) {
                    *value = name.into();
                }
            }
        }
        if let Some(quantization) = quantization.filter(|_| !self.linears.is_empty()) {
            config.insert(Checkpoint::QUANTIZATION_FIELDS[0].into(), quantization.to_json()?);
        }
        Ok(config)
    }

    /// Bytes of everything in the folder.
    ///
    /// # Errors
    /// `ERR_OUTPUT_UNWRITABLE`.
    pub fn bytes(&self) -> Result<u64> {
        folder_bytes(self.folder())
    }

    /// Gives the sealed folder its name.
    ///
    /// # Errors
    /// `ERR_OUTPUT_UNWRITABLE`; nothing stays then.
    pub fn commit(self) -> Result<()> {
        self.staged.commit()
    }

    fn check_schemes(&self, quantization: &QuantizationConfig) -> Result<()> {
        let (written, said) = (self.format, quantization.format);
        if written != said && !self.linears.is_empty() {
            let message =
                format!("matrices were written as {}, the configuration says {}", written.name(), said.name());
            return Err(Error::new(ErrorCode::QuantizationUnsupported, message)
                .subject("quantization_config")
                .hint("Give the writer and the configuration the same format"));
        }
        let wrong = self.linears.iter().find(|(name, (scheme, _))| !scheme.fits(quantization.scheme_of(name)));
        match wrong {
            None => Ok(()),
            Some((name, (scheme, _))) => {
                let stated = quantization.scheme_of(name);
                Err(Error::new(
                    ErrorCode::QuantizationUnsupported,
                    format!("a matrix was written with {scheme}, the configuration says {stated}"),
                )
                .subject(name)
                .hint("Name the Linear in the exceptions of the configuration"))
            }
        }
    }
}

fn write_json(path: &Path, object: Map<String, Value>) -> Result<()> {
    write_synced(path, format!("{:#}\n", Value::Object(object)).as_bytes())
}

/// Bytes of all files below `folder`.
fn folder_bytes(folder: &Path) -> Result<u64> {
    let failed = |error: std::io::Error| Error::unwritable(folder, &error);
    let mut total = 0;
    for entry in fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let metadata = entry.metadata().map_err(failed)?;
        total += if metadata.is_dir() { folder_bytes(&entry.path())? } else { metadata.len() };
    }
    Ok(total)
}
