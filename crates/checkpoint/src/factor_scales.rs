use std::path::{Path, PathBuf};

use kintsugi_runtime::Result;
use kintsugi_weights::{Adapter, ElementType, FactorCodes, GroupSize, LowRank, QuantizedMatrix, QuantizedParts};
use serde::{Deserialize, Serialize};

use crate::adapter_folder::as_adapter_error;
use crate::peft_adapter::invalid;
use crate::safetensors_writer::{SafetensorsWriter, TensorHeader, file_order, float_bytes, float_dtype};
use crate::tensor_set::TensorSet;

/// The scales of quantized factors, beside the PEFT weights that hold their values.
///
/// `factor_scales.safetensors` has `MODULE.lora_A.scales [rank, groups]` and `MODULE.lora_B.scales [out, groups]` in
/// bf16, and in its metadata under `kintsugi.factors` the width of the codes and the length of a group. Every value of
/// the weights is a scale times an integer: readers that know nothing of this file read the same factors.
#[derive(Debug)]
pub(crate) struct FactorScales {
    tensors: TensorSet,
    grid: Grid,
    path: PathBuf,
}

/// What stands under [`FactorScales::KEY`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Grid {
    bits: u8,
    group_size: usize,
}

impl FactorScales {
    pub(crate) const FILE_NAME: &'static str = "factor_scales.safetensors";
    const KEY: &'static str = "kintsugi.factors";

    /// Those of a PEFT folder; `None` when its factors are plain floats.
    ///
    /// # Errors
    /// `ERR_ADAPTER_INVALID` when the file is damaged or describes no grid that factors can have.
    pub(crate) fn open(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(Self::FILE_NAME);
        if !path.exists() {
            return Ok(None);
        }
        let tensors = TensorSet::open_file(&path).map_err(as_adapter_error)?;
        let text = tensors.metadata().get(Self::KEY).map_or("", String::as_str);
        let grid: Option<Grid> = serde_json::from_str(text).ok();
        match grid.filter(|grid| matches!(grid.bits, 4 | 8) && grid.group_size > 0) {
            Some(grid) => Ok(Some(FactorScales { tensors, grid, path })),
            None => Err(invalid("the file does not say what codes its scales belong to", path.display())
                .hint("Make the compensation again, or remove the file to read plain factors")),
        }
    }

    /// Whether the factors of a module are quantized: others may be plain beside them.
    pub(crate) fn has(&self, module: &str) -> bool {
        ["lora_A", "lora_B"].iter().any(|factor| self.tensors.get(&format!("{module}.{factor}.scales")).is_some())
    }

    /// The codes of the factors of a module, B `[out, rank]` and A `[rank, in]`, from their values.
    ///
    /// # Errors
    /// `ERR_ADAPTER_INVALID` when scales are missing or a value is no multiple of its scale.
    pub(crate) fn codes(&self, module: &str, plain: &LowRank) -> Result<FactorCodes> {
        let (rows, columns, rank) = (plain.out_features(), plain.in_features(), plain.rank());
        Ok(FactorCodes {
            b: self.factor(module, "lora_B", plain.b(), (rows, rank))?,
            a: self.factor(module, "lora_A", plain.a(), (rank, columns))?,
        })
    }

    fn factor(
        &self,
        module: &str,
        factor: &str,
        values: &[f32],
        (rows, columns): (usize, usize),
    ) -> Result<QuantizedMatrix> {
        let Grid { bits, group_size } = self.grid;
        let name = format!("{module}.{factor}.scales");
        let damaged = |message: &str| {
            invalid(message, &name)
                .hint(format!("Copy the folder again, or remove {} to read floats", self.path.display()))
        };
        let scales = self.tensors.matrix(&name).map_err(|error| damaged(&error.message))?;
        if (scales.rows(), scales.columns()) != (rows, columns.div_ceil(group_size)) {
            return Err(damaged("the scales have not the shape that their factor asks for"));
        }
        let scales = scales.to_f32();
        let centre = f32::from(1u16 << (bits - 1));
        let groups = columns.div_ceil(group_size);
        let code = |(at, &value): (usize, &f32)| {
            let scale = scales[at / columns * groups + at % columns / group_size];
            let steps = value / scale;
            let fits = steps.fract() == 0.0 && (-centre..centre).contains(&steps) && steps * scale == value;
            if fits { Ok((steps + centre) as u8) } else { Err(damaged("a value is no code times its scale")) }
        };
        let codes = values.iter().enumerate().map(code).collect::<Result<Vec<u8>>>()?;
        QuantizedMatrix::new(QuantizedParts {
            rows,
            columns,
            bits,
            group_size: GroupSize::Columns(group_size),
            codes,
            scales,
            scale_type: ElementType::Bf16,
            ..QuantizedParts::default()
        })
    }

    /// Writes the scales of the modules of `adapter` whose factors are quantized, if there are any.
    ///
    /// # Errors
    /// `ERR_OUTPUT_UNWRITABLE`; `ERR_ADAPTER_INVALID` when the codes have several grids.
    pub(crate) fn write(folder: &Path, adapter: &Adapter) -> Result<()> {
        let coded = || {
            let entries = adapter.linears.iter();
            entries.filter_map(|(name, entry)| entry.factors.codes().map(|codes| (name, codes)))
        };
        let grid = |matrix: &QuantizedMatrix| (matrix.bits(), matrix.scale_type(), matrix.is_symmetric());
        let Some((_, first)) = coded().next() else { return Ok(()) };
        let length = |matrix: &QuantizedMatrix| match matrix.group_size() {
            GroupSize::Columns(size) => size,
            GroupSize::WholeRow => matrix.columns(),
        };
        let sizes = coded().flat_map(|(_, codes)| [length(&codes.a), length(&codes.b)]);
        let group_size = sizes.max().unwrap_or(1);
        let mut tensors: Vec<(TensorHeader, &[f32])> = Vec::new();
        for (name, codes) in coded() {
            for (factor, matrix) in [("lora_A", &codes.a), ("lora_B", &codes.b)] {
                let groups = matrix.groups();
                let alike = grid(matrix) == grid(&first.a) && groups == matrix.columns().div_ceil(group_size);
                if !alike || !matrix.is_symmetric() || matrix.scale_type() != ElementType::Bf16 {
                    return Err(invalid("the factors have grids that one folder cannot hold", name)
                        .hint("Use one width and group size for all of them"));
                }
                let shape = vec![matrix.rows(), groups];
                let bytes = (matrix.scales().len() * 2) as u64;
                let name = format!("{name}.{factor}.scales");
                let header = TensorHeader { name, dtype: float_dtype(ElementType::Bf16), shape, bytes };
                tensors.push((header, matrix.scales()));
            }
        }
        tensors.sort_by(|(left, _), (right, _)| file_order(left, right));
        let description = serde_json::json!(Grid { bits: first.a.bits(), group_size }).to_string();
        let path = folder.join(Self::FILE_NAME);
        let headers = tensors.iter().map(|(header, _)| header);
        let mut writer = SafetensorsWriter::described(&path, headers, (Self::KEY, &description))?;
        for (_, scales) in &tensors {
            writer.write(&float_bytes(scales, ElementType::Bf16))?;
        }
        writer.finish().map(|_| ())
    }
}
