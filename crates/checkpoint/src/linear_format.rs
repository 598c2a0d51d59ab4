use std::fmt::Debug;

use kintsugi_runtime::{Error, ErrorCode, Result, nearest};
use kintsugi_weights::{ElementType, GroupAxis, GroupSize, QuantizedMatrix};
use safetensors::Dtype;
use serde_json::{Map, Value};

use crate::formats::{Awq, BitsAndBytes, Float4, Gptq, IntQuantized, Kintsugi, PackQuantized};
use crate::{LinearTensors, QuantizationConfig};

/// A layout of quantized Linears in the tensors of a checkpoint, with its `quantization_config`.
///
/// Every layout is decoded to the canonical [`QuantizedMatrix`] and encoded from it; values are never dequantized, so
/// what a layout cannot hold exactly it refuses.
pub trait LinearFormat: Debug + Sync {
    /// The name that users write and read.
    fn name(&self) -> &'static str;

    /// `quant_method` of its configurations.
    fn method(&self) -> &'static str;

    /// The fields of the configuration that name the layout within the method; the first that is there counts.
    fn layout_fields(&self) -> &'static [&'static str];

    /// Values of that field, in lower case, that mean this layout; `""` stands for a field that is not there.
    fn layouts(&self) -> &'static [&'static str];

    /// The suffix of the tensor that every Linear of this layout has.
    fn marker(&self) -> &'static str;

    /// Understands the `quantization_config` of this method and layout.
    ///
    /// # Errors
    /// `ERR_QUANTIZATION_UNSUPPORTED`, `ERR_CONFIG_INVALID`.
    fn read_config(&self, config: &Map<String, Value>) -> Result<QuantizationConfig>;

    /// The `quantization_config` that other readers of the layout expect.
    ///
    /// # Errors
    /// `ERR_QUANTIZATION_UNSUPPORTED` for what the configuration cannot say.
    fn write_config(&self, config: &QuantizationConfig) -> Result<Value>;

    /// Corrects what configurations of this layout are known to say wrongly, by the data of one Linear. Gives a
    /// sentence for the user when it did.
    ///
    /// # Errors
    /// What reading the tensors reports.
    fn settle(&self, config: &mut QuantizationConfig, linear: &LinearTensors<'_>) -> Result<Option<String>> {
        let _ = (config, linear);
        Ok(None)
    }

    /// Whether single Linears may be quantized otherwise than the rest.
    fn takes_exceptions(&self) -> bool {
        true
    }

    /// Whether other programs read it.
    fn is_common(&self) -> bool {
        true
    }

    /// Whether a matrix of that form can be written.
    ///
    /// # Errors
    /// What stands against it, as a clause.
    fn check(&self, form: &MatrixForm) -> Result<(), String>;

    /// Rows and columns of a Linear, without reading its codes.
    ///
    /// # Errors
    /// `ERR_CHECKPOINT_TENSOR_MISSING`, `ERR_CHECKPOINT_SHAPE`, `ERR_CHECKPOINT_DTYPE`.
    fn shape(&self, config: &QuantizationConfig, linear: &LinearTensors<'_>) -> Result<(usize, usize)>;

    /// Reads a Linear.
    ///
    /// # Errors
    /// As [`LinearFormat::shape`]; `ERR_CHECKPOINT_NOT_FINITE`, `ERR_CHECKPOINT_CORRUPT` with the name of the tensor.
    fn decode(&self, config: &QuantizationConfig, linear: &LinearTensors<'_>) -> Result<QuantizedMatrix>;

    /// Gives every tensor of `matrix`, which is not empty and has passed [`LinearFormat::check`], to `emit`, and stops
    /// at its first error.
    ///
    /// # Errors
    /// Those of `emit`.
    fn encode(&self, matrix: &QuantizedMatrix, emit: &mut dyn FnMut(EncodedTensor<'_>) -> Result<()>) -> Result<()>;
}

impl PartialEq for dyn LinearFormat {
    fn eq(&self, other: &Self) -> bool {
        self.name() == other.name()
    }
}

impl Eq for dyn LinearFormat {}

/// Every format, the one that is written by default first.
pub const FORMATS: &[&dyn LinearFormat] = &[
    &PackQuantized,
    &IntQuantized,
    &Float4::Nv,
    &Float4::Mx,
    &Gptq::V1,
    &Gptq::V2,
    &Awq,
    &BitsAndBytes::Nf4,
    &BitsAndBytes::Fp4,
    &Kintsugi,
];

/// The format of that name.
///
/// # Errors
/// `ERR_OPTION_UNKNOWN`, with the nearest name and all names in the hint.
pub fn linear_format(name: &str) -> Result<&'static dyn LinearFormat> {
    FORMATS.iter().find(|format| format.name() == name).copied().ok_or_else(|| {
        let names: Vec<&str> = FORMATS.iter().map(|format| format.name()).collect();
        let closest = nearest(name, names.iter().copied()).unwrap_or_default();
        Error::new(ErrorCode::OptionUnknown, format!("{name:?} is not a format of quantized Linears"))
            .subject("format")
            .hint(format!("Did you mean {closest:?}? Formats are: {}", names.join(", ")))
    })
}

/// A tensor of a Linear on its way to the file.
#[derive(Debug)]
pub struct EncodedTensor<'a> {
    /// What follows the name of the Linear and a dot.
    pub suffix: &'static str,
    /// Type of the elements.
    pub dtype: Dtype,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// Little-endian.
    pub bytes: &'a [u8],
}

/// What the codes of a matrix are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CodeGrid {
    /// Integers around a zero point.
    Integers,
    /// Integers and an offset per group.
    Offsets,
    /// The values of a table.
    Table,
}

impl CodeGrid {
    fn of(matrix: &QuantizedMatrix) -> Self {
        match (matrix.offsets(), matrix.code_table()) {
            (Some(_), _) => CodeGrid::Offsets,
            (None, Some(_)) => CodeGrid::Table,
            (None, None) => CodeGrid::Integers,
        }
    }
}

/// What decides whether a format can hold a matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MatrixForm {
    /// Rows (outputs).
    pub rows: usize,
    /// Columns (inputs).
    pub columns: usize,
    /// Width of a code.
    pub bits: u8,
    /// Columns per group.
    pub group_size: GroupSize,
    /// The smallest zero point; `None` on a symmetric grid, or while it is not known.
    pub smallest_zero_point: Option<u8>,
    /// Whether columns have groups of their own.
    pub group_index: bool,
    /// Which way groups lie.
    pub group_axis: GroupAxis,
    /// What codes are.
    pub grid: CodeGrid,
    /// The type that scales are stored in.
    pub scale_type: ElementType,
}

impl MatrixForm {
    /// The form of `matrix`.
    pub fn of(matrix: &QuantizedMatrix) -> Self {
        MatrixForm {
            rows: matrix.rows(),
            columns: matrix.columns(),
            bits: matrix.bits(),
            group_size: matrix.group_size(),
            smallest_zero_point: matrix.zero_points().and_then(|zero_points| zero_points.iter().min().copied()),
            group_index: matrix.group_index().is_some(),
            group_axis: matrix.group_axis(),
            grid: CodeGrid::of(matrix),
            scale_type: matrix.scale_type(),
        }
    }

    /// Refuses what no layout of integer codes with groups along the inputs holds.
    ///
    /// # Errors
    /// What stands against it, as a clause.
    pub(crate) fn check_integers(&self) -> Result<(), String> {
        match (self.grid, self.group_axis) {
            (CodeGrid::Integers, GroupAxis::Input) => Ok(()),
            (CodeGrid::Integers, GroupAxis::Output) => Err("its groups lie along the outputs".into()),
            (CodeGrid::Offsets, _) => Err("its groups have offsets in place of zero points".into()),
            (CodeGrid::Table, _) => Err("its codes stand for the values of a table".into()),
        }
    }

    /// Whether the last group of a row is shorter than the others.
    pub fn is_ragged(&self) -> bool {
        match self.group_size {
            GroupSize::Columns(size) => !self.columns.is_multiple_of(size.max(1)),
            GroupSize::WholeRow => false,
        }
    }

    /// Refuses a matrix of this form that `format` cannot hold, and names the formats that can.
    ///
    /// # Errors
    /// `ERR_QUANTIZATION_UNSUPPORTED`, without subject.
    pub fn check(&self, format: &dyn LinearFormat) -> Result<()> {
        let Err(reason) = format.check(self) else { return Ok(()) };
        let holds = |other: &&&dyn LinearFormat| other.check(self).is_ok();
        let mut others: Vec<&str> = FORMATS.iter().filter(holds).filter(|f| f.is_common()).map(|f| f.name()).collect();
        if others.is_empty() {
            others = FORMATS.iter().filter(holds).map(|format| format.name()).collect();
        }
        let message = format!("the format {} cannot hold the matrix: {reason}", format.name());
        Err(Error::new(ErrorCode::QuantizationUnsupported, message)
            .hint(format!("Write it as {}, which can", others.join(" or "))))
    }
}
