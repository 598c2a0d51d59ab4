use std::path::Path;

use kintsugi_runtime::Result;
use kintsugi_weights::{Adapter, ElementType};

use crate::adapter_folder::as_adapter_error;
use crate::peft_adapter::invalid;
use crate::safetensors_writer::{SafetensorsWriter, TensorHeader, file_order, float_bytes, float_dtype};
use crate::tensor_set::TensorSet;

/// What the directions of an affine compensation find in the mean of the inputs, beside the PEFT weights that hold
/// factors and biases.
///
/// `factor_centres.safetensors` has `MODULE.lora_A.centre [rank]`, `A μ`, in f32. With it the ranks can be divided:
/// the bias of the first r ranks is that of all and `Σ_{i≥r} bᵢ (aᵢ μ)`. Readers that know nothing of this file read the
/// same function.
#[derive(Debug)]
pub(crate) struct FactorCentres {
    tensors: TensorSet,
}

impl FactorCentres {
    pub(crate) const FILE_NAME: &'static str = "factor_centres.safetensors";

    /// Those of a PEFT folder; `None` when there is no such file.
    ///
    /// # Errors
    /// `ERR_ADAPTER_INVALID` when the file is damaged.
    pub(crate) fn open(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(Self::FILE_NAME);
        if !path.exists() {
            return Ok(None);
        }
        let tensors = TensorSet::open_file(&path).map_err(as_adapter_error)?;
        Ok(Some(FactorCentres { tensors }))
    }

    /// Those of a module of that rank.
    ///
    /// # Errors
    /// `ERR_ADAPTER_INVALID` when they are missing, of another shape, NaN or infinite.
    pub(crate) fn of(&self, module: &str, rank: usize) -> Result<Vec<f32>> {
        let name = name_of(module);
        let damaged = |message: &str| {
            let hint = format!("Copy the folder again, or remove {} to use all ranks", Self::FILE_NAME);
            invalid(message, &name).hint(hint)
        };
        let centre = self.tensors.vector(&name).map_err(|error| damaged(&error.message))?;
        if centre.len() == rank { Ok(centre) } else { Err(damaged("the centre has not the rank of its factors")) }
    }

    /// Writes the centres of the modules of `adapter`, where all biases have one.
    ///
    /// # Errors
    /// `ERR_OUTPUT_UNWRITABLE`.
    pub(crate) fn write(folder: &Path, adapter: &Adapter) -> Result<()> {
        let mut tensors: Vec<(TensorHeader, &[f32])> = Vec::new();
        for (name, entry) in &adapter.linears {
            let Some(centre) = entry.factors.bias().and_then(|bias| bias.centre.as_deref()) else { return Ok(()) };
            let (shape, bytes) = (vec![centre.len()], 4 * centre.len() as u64);
            let header = TensorHeader { name: name_of(name), dtype: float_dtype(ElementType::F32), shape, bytes };
            tensors.push((header, centre));
        }
        tensors.sort_by(|(left, _), (right, _)| file_order(left, right));
        let headers = tensors.iter().map(|(header, _)| header);
        let mut writer = SafetensorsWriter::create(&folder.join(Self::FILE_NAME), headers)?;
        for (_, centre) in &tensors {
            writer.write(&float_bytes(centre, ElementType::F32))?;
        }
        writer.finish().map(|_| ())
    }
}

fn name_of(module: &str) -> String {
    format!("{module}.lora_A.centre")
}
