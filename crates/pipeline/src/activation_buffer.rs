use std::ops::Range;
use std::path::{Path, PathBuf};

use half::bf16;
use half::slice::HalfFloatSliceExt;
use kintsugi_runtime::{Error, ErrorCode, Result, ScratchFile, replace_file};

/// The input of the next decoder block for every calibration token, `[tokens, width]` in bf16, in memory or in files.
///
/// What a block makes of some rows is written while later rows are still to be read; [`ActivationBuffer::turn`] makes
/// it the input of the block after. In files the two alternate, and so do the files that [`ActivationBuffer::save`]
/// leaves for a later run, so that one is whole at any time. They have one form: a run may go on in memory with what
/// another left on disk, and the other way round.
pub(crate) struct ActivationBuffer {
    rows: usize,
    width: usize,
    /// Which of the two files holds the input of the next block.
    current: usize,
    /// How they are called.
    names: [&'static str; 2],
    place: Place,
}

enum Place {
    Memory(Vec<bf16>),
    Disk { folder: PathBuf, files: [Option<ScratchFile>; 2] },
}

const FILE_NAMES: [&str; 2] = ["activations-0", "activations-1"];
/// Of the dense model, where both models run.
const DENSE_FILE_NAMES: [&str; 2] = ["activations-dense-0", "activations-dense-1"];

impl ActivationBuffer {
    /// Room for `rows` rows of `width`: in memory, or in files of `folder`.
    pub(crate) fn new(rows: usize, width: usize, folder: Option<&Path>) -> Self {
        let place = match folder {
            None => Place::Memory(vec![bf16::ZERO; rows * width]),
            Some(folder) => Place::Disk { folder: folder.to_path_buf(), files: [None, None] },
        };
        ActivationBuffer { rows, width, current: 0, names: FILE_NAMES, place }
    }

    /// With files beside those of another buffer in the same folder.
    pub(crate) fn of_dense_model(self) -> Self {
        ActivationBuffer { names: DENSE_FILE_NAMES, ..self }
    }

    /// Bytes of that many activations.
    pub(crate) fn bytes(rows: usize, width: usize) -> u64 {
        (rows as u64).saturating_mul((width * size_of::<bf16>()) as u64)
    }

    /// Number of tokens.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// The rows `rows` of the input of the next block.
    ///
    /// # Errors
    /// `ERR_OUTPUT_UNWRITABLE` when the file cannot be read.
    pub(crate) fn read(&self, rows: Range<usize>) -> Result<Vec<f32>> {
        let mut values = vec![0.0; rows.len() * self.width];
        match &self.place {
            Place::Memory(all) => all[rows.start * self.width..rows.end * self.width].convert_to_f32_slice(&mut values),
            Place::Disk { files, .. } => {
                let mut narrow = vec![bf16::ZERO; values.len()];
                let file = files[self.current].as_ref().ok_or_else(|| Error::new(ErrorCode::Internal, "no input"))?;
                file.read_at(bytemuck::cast_slice_mut(&mut narrow), Self::bytes(rows.start, self.width))?;
                narrow.convert_to_f32_slice(&mut values);
            }
        }
        Ok(values)
    }

    /// Writes what the block makes of the rows from `first` on, which are not read again.
    ///
    /// # Errors
    /// `ERR_OUTPUT_UNWRITABLE`.
    pub(crate) fn write(&mut self, first: usize, values: &[f32]) -> Result<()> {
        let at = first * self.width;
        match &mut self.place {
            Place::Memory(all) => all[at..at + values.len()].convert_from_f32_slice(values),
            Place::Disk { folder, files } => {
                let next = 1 - self.current;
                let file = match &mut files[next] {
                    Some(file) => file,
                    none => none.insert(ScratchFile::create(&folder.join(self.names[next]))?),
                };
                let mut narrow = vec![bf16::ZERO; values.len()];
                narrow.convert_from_f32_slice(values);
                file.write_at(bytemuck::cast_slice(&narrow), Self::bytes(first, self.width))?;
            }
        }
        Ok(())
    }

    /// Makes what was written the input of the next block.
    pub(crate) fn turn(&mut self) {
        self.current = 1 - self.current;
    }

    /// Leaves the input of the next block on the disk for a later run. Gives the name of its file in `folder`, which is
    /// that of the buffer if it is on disk.
    ///
    /// # Errors
    /// `ERR_OUTPUT_UNWRITABLE`.
    pub(crate) fn save(&self, folder: &Path) -> Result<String> {
        let name = self.names[self.current];
        match &self.place {
            Place::Memory(all) => replace_file(&folder.join(name), bytemuck::cast_slice(all))?,
            Place::Disk { files, .. } => files[self.current].iter().try_for_each(ScratchFile::sync)?,
        }
        Ok(name.to_owned())
    }

    /// Takes the input of the next block from what an earlier run has saved.
    ///
    /// # Errors
    /// `ERR_RESUME_MISMATCH` when it is not there or not whole.
    pub(crate) fn restore(&mut self, folder: &Path, name: &str) -> Result<()> {
        let path = folder.join(name);
        let damaged = |message: String| {
            Error::new(ErrorCode::ResumeMismatch, message)
                .subject(path.display())
                .hint("Discard what the interrupted job left with fresh (--fresh)")
        };
        let current = self.names.iter().position(|&known| known == name);
        let current = current.ok_or_else(|| damaged("there are no activations of that name".into()))?;
        let unreadable = |error: Error| damaged(format!("the activations cannot be read: {}", error.message));
        let file = ScratchFile::open(&path).map_err(unreadable)?;
        let (found, expected) = (file.length().map_err(unreadable)?, Self::bytes(self.rows, self.width));
        if found != expected {
            return Err(damaged(format!("the activations have {found} bytes instead of {expected}")));
        }
        self.current = current;
        match &mut self.place {
            Place::Memory(all) => file.read_at(bytemuck::cast_slice_mut(all), 0).map_err(unreadable)?,
            Place::Disk { files, .. } => files[current] = Some(file),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_and_disk_hold_the_same_and_take_over_from_each_other() {
        let (rows, width) = (7, 5);
        let values: Vec<f32> = (0..rows * width).map(|i| (i as f32 * 0.37).sin() * 100.0).collect();
        let rounded: Vec<f32> = values.iter().map(|&value| bf16::from_f32(value).to_f32()).collect();
        let root = tempfile::tempdir().unwrap();
        for from_disk in [false, true] {
            let folder = root.path();
            let mut buffer = ActivationBuffer::new(rows, width, from_disk.then_some(folder));
            for block in 0..3 {
                let next: Vec<f32> = values.iter().map(|value| value + block as f32).collect();
                buffer.write(0, &next[..3 * width]).unwrap();
                buffer.write(3, &next[3 * width..]).unwrap();
                buffer.turn();
            }
            buffer.write(0, &values).unwrap();
            buffer.turn();
            assert_eq!(buffer.read(0..rows).unwrap(), rounded);
            assert_eq!(buffer.read(2..4).unwrap(), rounded[2 * width..4 * width]);
            let name = buffer.save(folder).unwrap();
            assert_eq!(std::fs::metadata(folder.join(&name)).unwrap().len(), ActivationBuffer::bytes(rows, width));
            for to_disk in [false, true] {
                let mut later = ActivationBuffer::new(rows, width, to_disk.then_some(folder));
                later.restore(folder, &name).unwrap();
                assert_eq!(later.read(0..rows).unwrap(), rounded);
            }
            let mut other = ActivationBuffer::new(rows + 1, width, None);
            assert_eq!(other.restore(folder, &name).unwrap_err().code, ErrorCode::ResumeMismatch);
            assert_eq!(other.restore(folder, "activations-7").unwrap_err().code, ErrorCode::ResumeMismatch);

            let mut dense = ActivationBuffer::new(rows, width, from_disk.then_some(folder)).of_dense_model();
            dense.write(0, &vec![1.0; rows * width]).unwrap();
            dense.turn();
            let of_dense = dense.save(folder).unwrap();
            assert_ne!(of_dense, name);
            assert_eq!(buffer.read(0..rows).unwrap(), rounded, "another buffer in the folder changes nothing");
            let mut later = ActivationBuffer::new(rows, width, None);
            assert_eq!(later.restore(folder, &of_dense).unwrap_err().code, ErrorCode::ResumeMismatch);
            let mut later = later.of_dense_model();
            later.restore(folder, &of_dense).unwrap();
            assert_eq!(later.read(0..rows).unwrap(), vec![1.0; rows * width]);
        }
    }
}
