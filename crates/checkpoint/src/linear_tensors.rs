use kintsugi_runtime::{Error, ErrorCode, Result};
use kintsugi_weights::{DenseMatrix, ElementType};
use safetensors::Dtype;

use crate::safetensors_file::{not_finite, wrong_shape};
use crate::tensor_set::TensorSet;

const DAMAGED: &str = "The checkpoint is damaged; download it again";

/// The stored tensors of one Linear, for the formats to decode. Every size is checked against the file before memory
/// is taken.
#[derive(Clone, Copy, Debug)]
pub struct LinearTensors<'a> {
    name: &'a str,
    tensors: &'a TensorSet,
}

impl<'a> LinearTensors<'a> {
    /// Those of the Linear `name`.
    pub(crate) fn new(name: &'a str, tensors: &'a TensorSet) -> Self {
        LinearTensors { name, tensors }
    }

    /// The name of the Linear.
    pub(crate) fn name(&self) -> &'a str {
        self.name
    }

    /// Whether `NAME.suffix` is stored.
    pub(crate) fn has(&self, suffix: &str) -> bool {
        self.tensors.get(&self.tensor(suffix)).is_some()
    }

    /// The shape of a tensor of two dimensions, neither of them zero.
    ///
    /// # Errors
    /// `ERR_CHECKPOINT_TENSOR_MISSING`, `ERR_CHECKPOINT_SHAPE`.
    pub(crate) fn matrix_shape(&self, suffix: &str) -> Result<(usize, usize)> {
        let tensor = self.tensor(suffix);
        let (_, stored) = self.tensors.require(&tensor)?;
        match *stored.shape.as_slice() {
            [rows, columns] if rows > 0 && columns > 0 => Ok((rows, columns)),
            _ => Err(wrong_shape(&tensor, &stored.shape, "[rows, columns] without a zero")),
        }
    }

    /// The values of a tensor of integers that must have type `dtype`, as wide as `T`, and `shape`.
    ///
    /// # Errors
    /// `ERR_CHECKPOINT_TENSOR_MISSING`, `ERR_CHECKPOINT_DTYPE`, `ERR_CHECKPOINT_SHAPE`.
    pub(crate) fn integers<T: bytemuck::Pod>(&self, suffix: &str, dtype: Dtype, shape: &[usize]) -> Result<Vec<T>> {
        let tensor = self.tensor(suffix);
        let (file, stored) = self.tensors.require(&tensor)?;
        if stored.dtype != dtype {
            let message = format!("the tensor has type {}, expected {dtype}", stored.dtype);
            return Err(Error::new(ErrorCode::CheckpointDtype, message)
                .subject(tensor)
                .hint("Quantize the model again with a present release of the program that made it"));
        }
        if stored.shape != shape {
            return Err(wrong_shape(&tensor, &stored.shape, &format!("{shape:?}")));
        }
        file.read_values(stored)
    }

    /// The values of a float matrix of `shape`, all of them finite, and the type that they are stored in.
    ///
    /// # Errors
    /// `ERR_CHECKPOINT_TENSOR_MISSING`, `ERR_CHECKPOINT_DTYPE`, `ERR_CHECKPOINT_SHAPE`, `ERR_CHECKPOINT_NOT_FINITE`.
    pub(crate) fn scales(&self, suffix: &str, shape: [usize; 2]) -> Result<(Vec<f32>, ElementType)> {
        let tensor = self.tensor(suffix);
        let (_, stored) = self.tensors.require(&tensor)?;
        if stored.shape != shape {
            return Err(wrong_shape(&tensor, &stored.shape, &format!("{shape:?}")));
        }
        let scales = self.tensors.matrix(&tensor)?;
        Ok((scales.to_f32(), scales.element_type()))
    }

    /// Scales `[rows, columns]` as f32, all of them finite. A single one may have any number of dimensions.
    ///
    /// # Errors
    /// As [`LinearTensors::scales`].
    pub(crate) fn flat_scales(&self, suffix: &str, shape: [usize; 2]) -> Result<Vec<f32>> {
        let tensor = self.tensor(suffix);
        let (file, stored) = self.tensors.require(&tensor)?;
        let is_single = shape == [1, 1] && stored.shape.iter().all(|&size| size == 1);
        if stored.shape != shape && !is_single {
            return Err(wrong_shape(&tensor, &stored.shape, &format!("{shape:?}")));
        }
        let scales = DenseMatrix::new(shape[0], shape[1], file.read_floats(&tensor, stored)?);
        match scales.first_not_finite() {
            Some((row, column)) => Err(not_finite(&tensor, &format!("row {row}, column {column}"))),
            None => Ok(scales.to_f32()),
        }
    }

    /// The length of a tensor of one dimension.
    ///
    /// # Errors
    /// `ERR_CHECKPOINT_TENSOR_MISSING`, `ERR_CHECKPOINT_SHAPE`.
    pub(crate) fn vector_length(&self, suffix: &str) -> Result<usize> {
        let tensor = self.tensor(suffix);
        let (_, stored) = self.tensors.require(&tensor)?;
        match *stored.shape.as_slice() {
            [length] => Ok(length),
            _ => Err(wrong_shape(&tensor, &stored.shape, "[length]")),
        }
    }

    /// A vector of `length` floats, all of them finite.
    ///
    /// # Errors
    /// As [`LinearTensors::scales`].
    pub(crate) fn floats(&self, suffix: &str, length: usize) -> Result<Vec<f32>> {
        let tensor = self.tensor(suffix);
        let (_, stored) = self.tensors.require(&tensor)?;
        if stored.shape != [length] {
            return Err(wrong_shape(&tensor, &stored.shape, &format!("[{length}]")));
        }
        self.tensors.vector(&tensor)
    }

    /// The group of each column, i32 `[columns]`; `None` where the tensor was never filled (all −1).
    ///
    /// # Errors
    /// As [`LinearTensors::integers`]; `ERR_CHECKPOINT_CORRUPT` for a group that does not exist.
    pub(crate) fn group_index(&self, suffix: &str, columns: usize, groups: usize) -> Result<Option<Vec<u32>>> {
        let index: Vec<i32> = self.integers(suffix, Dtype::I32, &[columns])?;
        if index.iter().all(|&group| group == -1) {
            return Ok(None);
        }
        let group_of = |(column, &group): (usize, &i32)| {
            u32::try_from(group).ok().filter(|&group| (group as usize) < groups).ok_or_else(|| {
                let message = format!("column {column} belongs to group {group}, but there are {groups} groups");
                self.corrupt(suffix, message)
            })
        };
        index.iter().enumerate().map(group_of).collect::<Result<_>>().map(Some)
    }

    /// Refuses `NAME.suffix`: a tensor that `config.json` does not speak of would be ignored by other readers,
    /// silently.
    ///
    /// # Errors
    /// `ERR_CHECKPOINT_CORRUPT`.
    pub(crate) fn refuse_unannounced(&self, suffix: &str, meaning: &str) -> Result<()> {
        if !self.has(suffix) {
            return Ok(());
        }
        let message = format!("the tensor says that {meaning}, the quantization config says the opposite");
        Err(self.contradiction(suffix, message))
    }

    /// `ERR_CHECKPOINT_CORRUPT` for a tensor that contradicts `config.json`.
    pub(crate) fn contradiction(&self, suffix: &str, message: String) -> Error {
        Error::new(ErrorCode::CheckpointCorrupt, message)
            .subject(self.tensor(suffix))
            .hint("config.json and weights may belong to different models; download the folder again")
    }

    /// `ERR_CHECKPOINT_CORRUPT` for a tensor with impossible content.
    pub(crate) fn corrupt(&self, suffix: &str, message: String) -> Error {
        Error::new(ErrorCode::CheckpointCorrupt, message).subject(self.tensor(suffix)).hint(DAMAGED)
    }

    /// `ERR_CHECKPOINT_SHAPE` for a tensor whose size or content asks for an impossible matrix.
    pub(crate) fn impossible(&self, suffix: &str, message: impl Into<String>) -> Error {
        Error::new(ErrorCode::CheckpointShape, message).subject(self.tensor(suffix)).hint(DAMAGED)
    }

    fn tensor(&self, suffix: &str) -> String {
        format!("{}.{suffix}", self.name)
    }
}
