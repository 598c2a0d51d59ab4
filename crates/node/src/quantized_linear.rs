use std::sync::{Arc, Mutex, MutexGuard};

use kintsugi_compress::{QuantizeOptions, linear_method};
use kintsugi_kernels::{Kernels, PackedMatrix};
use kintsugi_runtime::{Error, ErrorCode, Result, ThreadPool};
use kintsugi_weights::{DenseMatrix, ElementType, GroupSize, LinearWeight, WeightMatrix};
use napi::Env;
use napi::bindgen_prelude::{Float32Array, Float32ArraySlice, Object};
use napi_derive::napi;

use crate::error::{disposed, to_napi};
use crate::job::spawn;
use crate::model::precision;

/// Options of `QuantizedLinear.quantize`; `src/quantized-linear.ts` fills in the defaults.
#[napi(object, object_to_js = false)]
pub struct BindingQuantizedLinearOptions {
    pub out_features: u32,
    pub in_features: u32,
    pub bits: u32,
    /// 0 for the whole row.
    pub group_size: u32,
    pub symmetric: bool,
    /// `f32`, `exact` or `fast`.
    pub precision: String,
}

struct Layer {
    kernels: Kernels,
    packed: PackedMatrix,
    stored_bits: u64,
    bits: u8,
}

/// One quantized Linear, for models that live outside a checkpoint.
#[napi]
pub struct BindingQuantizedLinear {
    layer: Mutex<Option<Arc<Layer>>>,
}

#[napi]
impl BindingQuantizedLinear {
    /// Quantizes `weights` `[outFeatures, inFeatures]` by rounding to nearest.
    #[napi(factory)]
    pub fn quantize(weights: &[f32], options: BindingQuantizedLinearOptions) -> napi::Result<Self> {
        let layer = quantize(weights, &options).map_err(|error| to_napi(&error))?;
        Ok(BindingQuantizedLinear { layer: Mutex::new(Some(Arc::new(layer))) })
    }

    /// `x` `[count, inFeatures]` → `y` `[count, outFeatures]`, on the calling thread and the pool.
    ///
    /// The caller gives the memory: results that live in memory of ours until the garbage collector comes by would
    /// keep the allocator from giving back what lies around them.
    #[napi]
    pub fn forward(&self, x: &[f32], mut y: Float32ArraySlice<'_>) -> napi::Result<()> {
        let layer = self.layer().map_err(|error| to_napi(&error))?;
        // SAFETY: `src/quantized-linear.ts` made the array for this call; nobody else sees it before the call returns.
        let y = unsafe { y.as_mut() };
        layer.forward(x, y).map_err(|error| to_napi(&error))
    }

    /// Like `forward`, off the JavaScript thread; `x` is copied first.
    #[napi(ts_return_type = "Promise<Float32Array>")]
    pub fn forward_async<'env>(&self, env: &'env Env, x: &[f32]) -> napi::Result<Object<'env>> {
        let layer = self.layer().map_err(|error| to_napi(&error))?;
        let x = x.to_vec();
        spawn(env, move || {
            let mut y = vec![0.0; x.len() / layer.packed.columns() * layer.packed.rows()];
            layer.forward(&x, &mut y)?;
            Ok(Float32Array::new(y))
        })
    }

    /// Shape and size.
    #[napi(ts_return_type = "unknown")]
    pub fn info(&self) -> napi::Result<serde_json::Value> {
        let layer = self.layer().map_err(|error| to_napi(&error))?;
        let weights = layer.packed.rows() * layer.packed.columns();
        Ok(serde_json::json!({
            "outFeatures": layer.packed.rows(),
            "inFeatures": layer.packed.columns(),
            "bits": layer.bits,
            "bitsPerWeight": layer.stored_bits as f64 / weights as f64,
            "memoryBytes": layer.packed.memory_bytes(),
            "arithmetic": layer.kernels.arithmetic(&layer.packed).name(),
            "cpuLevel": layer.kernels.level().name(),
        }))
    }

    /// Releases the weights. Idempotent.
    #[napi]
    pub fn dispose(&self) {
        self.lock().take();
    }

    fn layer(&self) -> Result<Arc<Layer>> {
        self.lock().clone().ok_or_else(|| disposed("QuantizedLinear"))
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<Layer>>> {
        self.layer.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Layer {
    fn forward(&self, x: &[f32], y: &mut [f32]) -> Result<()> {
        let (rows, columns) = (self.packed.rows(), self.packed.columns());
        if x.is_empty() || !x.len().is_multiple_of(columns) {
            return Err(Error::new(ErrorCode::ShapeMismatch, format!("x has {} values", x.len()))
                .subject("x")
                .hint(format!("Give a multiple of inFeatures = {columns}")));
        }
        let outputs = x.len() / columns * rows;
        if y.len() != outputs {
            return Err(Error::new(ErrorCode::ShapeMismatch, format!("y has {} values", y.len()))
                .subject("y")
                .hint(format!("Give room for {outputs} outputs")));
        }
        self.kernels.product(&self.packed, x, y, ThreadPool::global());
        Ok(())
    }
}

fn quantize(weights: &[f32], options: &BindingQuantizedLinearOptions) -> Result<Layer> {
    let (rows, columns) = (options.out_features as usize, options.in_features as usize);
    if rows == 0 || columns == 0 || weights.len() != rows * columns {
        let message = format!("{} values do not make a {rows}×{columns} matrix", weights.len());
        return Err(Error::new(ErrorCode::ShapeMismatch, message)
            .subject("weights")
            .hint("Give outFeatures · inFeatures values, row after row"));
    }
    let quantize_options = QuantizeOptions {
        bits: u8::try_from(options.bits).unwrap_or(u8::MAX),
        group_size: match options.group_size {
            0 => GroupSize::WholeRow,
            columns => GroupSize::Columns(columns as usize),
        },
        symmetric: options.symmetric,
        scale_type: ElementType::F16,
        ..QuantizeOptions::default()
    };
    quantize_options.validate()?;
    let pool = ThreadPool::global();
    let dense = DenseMatrix::from_f32(rows, columns, weights.to_vec());
    let quantized = linear_method("rtn")?.compress(&dense, None, &quantize_options, pool)?;
    let (stored_bits, bits) = (quantized.stored_bits(), quantized.bits());
    let kernels = Kernels::selected()?;
    let weight = LinearWeight::plain(WeightMatrix::Quantized(quantized));
    let packed = kernels.pack(&weight, precision(&options.precision)?, pool)?;
    Ok(Layer { kernels, packed, stored_bits, bits })
}
