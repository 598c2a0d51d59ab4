use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use kintsugi_runtime::{Error, ErrorCode, Result};
use safetensors::Dtype;
use serde::{Deserialize, Serialize};

use crate::checkpoint_writer::COPY_BUFFER;
use crate::positional_file::PositionalFile;
use crate::safetensors_file::{SafetensorsFile, StoredTensor};
use crate::safetensors_writer::{SafetensorsWriter, TensorHeader, file_order, write_synced};
use crate::shard_index::ShardIndex;
use crate::tensor_set::TensorSet;

/// Most bytes of tensors in one file, as transformers has it.
const SHARD_BYTES: u64 = 5_000_000_000;

/// Tensors on their way into a checkpoint: those of a unit of work lie in a part file, one after the other, until all
/// parts are merged into files of the format.
#[derive(Debug)]
pub(crate) struct StagedParts {
    folder: PathBuf,
    open: Option<OpenPart>,
    tensors: BTreeMap<String, StagedTensor>,
    /// The part files, the open one last.
    paths: Vec<PathBuf>,
    /// Most bytes of tensors in one file of the checkpoint.
    pub(crate) shard_bytes: u64,
}

/// What a part file holds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct PartRecord {
    bytes: u64,
    tensors: Vec<RecordedTensor>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct RecordedTensor {
    #[serde(flatten)]
    header: TensorHeader,
    offset: u64,
}

/// A tensor in a part file.
#[derive(Debug)]
struct StagedTensor {
    header: TensorHeader,
    part: usize,
    offset: u64,
}

#[derive(Debug)]
struct OpenPart {
    output: BufWriter<File>,
    bytes: u64,
}

impl PartRecord {
    /// Whether every tensor lies inside of the part.
    fn is_sound(&self) -> bool {
        let end = |tensor: &RecordedTensor| tensor.offset.checked_add(tensor.header.bytes);
        self.tensors.iter().all(|tensor| end(tensor).is_some_and(|end| end <= self.bytes))
    }
}

impl StagedParts {
    /// No parts yet, in `folder`.
    pub(crate) fn new(folder: &Path) -> Self {
        let (tensors, paths) = (BTreeMap::new(), Vec::new());
        StagedParts { folder: folder.to_path_buf(), open: None, tensors, paths, shard_bytes: SHARD_BYTES }
    }

    /// Adds a part that an earlier run has closed.
    pub(crate) fn resume(&mut self, record: &PartRecord) {
        let part = self.paths.len();
        for RecordedTensor { header, offset } in &record.tensors {
            let staged = StagedTensor { header: header.clone(), part, offset: *offset };
            self.tensors.insert(header.name.clone(), staged);
        }
        self.paths.push(self.folder.join(part_name(part)));
    }

    /// Whether the files of all parts hold what `records` say of them.
    pub(crate) fn are_whole<'a>(&self, records: impl Iterator<Item = &'a PartRecord>) -> bool {
        // A part that was merged is gone; what it held must then be in a finished file.
        let merging = self.finished_shards() > 0;
        let is_whole = |(path, record): (&PathBuf, &PartRecord)| {
            let there = fs::metadata(path).map_or(0, |metadata| metadata.len());
            record.is_sound() && (there >= record.bytes || (merging && there == 0))
        };
        self.paths.iter().zip(records).all(is_whole)
    }

    /// The index of the part that was begun last.
    pub(crate) fn current(&self) -> usize {
        self.paths.len().saturating_sub(1)
    }

    /// Begins a tensor behind those of the open part, or in a new one.
    ///
    /// # Errors
    /// `ERR_OUTPUT_UNWRITABLE`; `ERR_INTERNAL` when the tensor was written before.
    pub(crate) fn begin_tensor(&mut self, name: &str, dtype: Dtype, shape: Vec<usize>, bytes: u64) -> Result<()> {
        if self.tensors.contains_key(name) {
            return Err(Error::new(ErrorCode::Internal, "the tensor was written twice").subject(name));
        }
        if self.open.is_none() {
            let path = self.folder.join(part_name(self.paths.len()));
            let file = File::create(&path).map_err(|error| Error::unwritable(&path, &error))?;
            self.paths.push(path);
            self.open = Some(OpenPart { output: BufWriter::with_capacity(COPY_BUFFER, file), bytes: 0 });
        }
        let offset = self.open.as_ref().map_or(0, |part| part.bytes);
        let header = TensorHeader { name: name.to_string(), dtype, shape, bytes };
        self.tensors.insert(name.to_string(), StagedTensor { header, part: self.current(), offset });
        Ok(())
    }

    /// Writes bytes of the tensor that was begun last.
    ///
    /// # Errors
    /// `ERR_OUTPUT_UNWRITABLE`.
    pub(crate) fn append(&mut self, bytes: &[u8]) -> Result<()> {
        if let Some(part) = &mut self.open {
            part.output
                .write_all(bytes)
                .map_err(|error| Error::unwritable(&self.paths[self.paths.len() - 1], &error))?;
            part.bytes += bytes.len() as u64;
        }
        Ok(())
    }

    /// Closes the open part: what was written until now is on the disk. Gives what it holds, `None` when nothing was
    /// written.
    ///
    /// # Errors
    /// `ERR_OUTPUT_UNWRITABLE`.
    pub(crate) fn close(&mut self) -> Result<Option<PartRecord>> {
        let Some(part) = self.open.take() else { return Ok(None) };
        let index = self.current();
        let close = |output: BufWriter<File>| output.into_inner()?.sync_all();
        close(part.output).map_err(|error| Error::unwritable(&self.paths[index], &error))?;
        let of_part = self.tensors.values().filter(|tensor| tensor.part == index);
        let tensors = of_part.map(|t| RecordedTensor { header: t.header.clone(), offset: t.offset }).collect();
        Ok(Some(PartRecord { bytes: part.bytes, tensors }))
    }

    /// The tensors of the closed parts, to be read where they lie until they are merged.
    ///
    /// # Errors
    /// `ERR_CHECKPOINT_NOT_FOUND` when a part was merged already, `ERR_CHECKPOINT_CORRUPT` when it is not whole.
    pub(crate) fn tensors(&self) -> Result<TensorSet> {
        let mut placed = vec![BTreeMap::new(); self.paths.len()];
        for StagedTensor { header, part, offset } in self.tensors.values() {
            let TensorHeader { name, dtype, shape, bytes } = header.clone();
            placed[*part].insert(name, StoredTensor { dtype, shape, offset: *offset, bytes });
        }
        let parts = self.paths.iter().zip(placed);
        let files = parts.map(|(path, tensors)| SafetensorsFile::without_header(path, tensors));
        Ok(TensorSet::from_files(files.collect::<Result<_>>()?))
    }

    /// Merges the closed parts into `model.safetensors`, or into shards with an index when they are larger than one file
    /// may be. Interrupted, it goes on with the files that are not whole.
    ///
    /// # Errors
    /// `ERR_OUTPUT_UNWRITABLE`.
    pub(crate) fn merge(&self) -> Result<()> {
        let shards = self.plan_shards();
        let finished = self.finished_shards();
        let mut parts = Vec::new();
        for path in &self.paths {
            // Of a part that an earlier run used up nothing is read again.
            let used_up = finished > 0 && !path.exists();
            let open = || PositionalFile::open(path).map_err(|error| Error::unwritable(path, &error));
            parts.push(if used_up { None } else { Some(open()?) });
        }
        let mut left_in_part = vec![0usize; parts.len()];
        for tensor in self.tensors.values() {
            left_in_part[tensor.part] += 1;
        }

        let mut index = ShardIndex { weight_map: BTreeMap::new() };
        let mut buffer = vec![0; COPY_BUFFER];
        for (position, shard) in shards.iter().enumerate() {
            let file_name = shard_name(position, shards.len());
            for tensor in shard {
                index.weight_map.insert(tensor.header.name.clone(), file_name.clone());
                left_in_part[tensor.part] -= 1;
            }
            if position >= finished {
                let path = self.folder.join(&file_name);
                let mut writer = SafetensorsWriter::create(&path, shard.iter().map(|tensor| &tensor.header))?;
                for tensor in shard {
                    if let Some(part) = &parts[tensor.part] {
                        copy_range(part, tensor.offset, tensor.header.bytes, &mut buffer, &mut writer)?;
                    }
                }
                writer.finish()?;
            }
            // Parts that are used up go at once: the disk need not hold everything twice.
            for (part, path) in self.paths.iter().enumerate() {
                if left_in_part[part] == 0 && parts[part].take().is_some() {
                    fs::remove_file(path).map_err(|error| Error::unwritable(path, &error))?;
                }
            }
        }
        if shards.len() > 1 {
            let total = self.tensors.values().map(|tensor| tensor.header.bytes).sum();
            write_synced(&self.folder.join(ShardIndex::FILE_NAME), &index.to_bytes(total))?;
        }
        Ok(())
    }

    /// How many of the files that the parts are merged into are whole; they are made in order.
    fn finished_shards(&self) -> usize {
        let count = self.plan_shards().len();
        (0..count).take_while(|&position| self.folder.join(shard_name(position, count)).exists()).count()
    }

    /// Tensors in name order, cut where a file is full; within a file in the order of the format.
    fn plan_shards(&self) -> Vec<Vec<&StagedTensor>> {
        let mut shards: Vec<Vec<&StagedTensor>> = vec![Vec::new()];
        let mut bytes = 0;
        for tensor in self.tensors.values() {
            let full = bytes + tensor.header.bytes > self.shard_bytes;
            match shards.last_mut() {
                Some(shard) if !full || shard.is_empty() => {
                    shard.push(tensor);
                    bytes += tensor.header.bytes;
                }
                _ => {
                    shards.push(vec![tensor]);
                    bytes = tensor.header.bytes;
                }
            }
        }
        for shard in &mut shards {
            shard.sort_by(|left, right| file_order(&left.header, &right.header));
        }
        shards
    }
}

fn part_name(part: usize) -> String {
    format!("unit-{part:05}.part")
}

fn shard_name(position: usize, count: usize) -> String {
    match count {
        1 => TensorSet::SINGLE_FILE.to_string(),
        _ => format!("model-{:05}-of-{count:05}.safetensors", position + 1),
    }
}

fn copy_range(
    part: &PositionalFile,
    offset: u64,
    bytes: u64,
    buffer: &mut [u8],
    writer: &mut SafetensorsWriter,
) -> Result<()> {
    let mut done = 0;
    while done < bytes {
        let count = buffer.len().min((bytes - done) as usize);
        part.read_exact_at(&mut buffer[..count], offset + done)?;
        writer.write(&buffer[..count])?;
        done += count as u64;
    }
    Ok(())
}
