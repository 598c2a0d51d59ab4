//! A checkpoint rewritten so that the weights of its Linears are 8-bit floats.

use std::fs;
use std::path::Path;

use half::bf16;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

/// Rows and columns that share a scale.
const TILE: usize = 128;
/// The largest F8_E4M3 number.
const LARGEST: f32 = 448.0;

/// Copies the checkpoint `source` (one bf16 safetensors file) to `target` with the Linears of the decoder blocks in
/// F8_E4M3 and a `weight_scale_inv` per tile of 128×128, as `quant_method: fp8` of transformers stores them.
///
/// # Panics
/// When a file cannot be read, is not such a checkpoint, or cannot be written.
pub fn write_float8_checkpoint(source: &Path, target: &Path) {
    fs::create_dir_all(target).unwrap();
    fs::copy(source.join("tokenizer.json"), target.join("tokenizer.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_slice(&fs::read(source.join("config.json")).unwrap()).unwrap();
    config["quantization_config"] = serde_json::json!({
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [TILE, TILE],
    });
    fs::write(target.join("config.json"), config.to_string()).unwrap();

    let bytes = fs::read(source.join("model.safetensors")).unwrap();
    let mut tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
    for (name, view) in SafeTensors::deserialize(&bytes).unwrap().iter() {
        let (shape, data) = (view.shape().to_vec(), view.data());
        if !name.ends_with("_proj.weight") {
            tensors.push((name.to_owned(), view.dtype(), shape, data.to_vec()));
            continue;
        }
        let values: Vec<f32> = data.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect();
        let [rows, columns] = [shape[0], shape[1]];
        let across = columns.div_ceil(TILE);
        let tile_of = |i: usize| i / columns / TILE * across + i % columns / TILE;
        let mut scales = vec![0f32; rows.div_ceil(TILE) * across];
        for (i, value) in values.iter().enumerate() {
            scales[tile_of(i)] = scales[tile_of(i)].max(value.abs() / LARGEST);
        }
        let codes = values.iter().enumerate().map(|(i, value)| nearest_float8(value / scales[tile_of(i)])).collect();
        let scale_bytes = scales.iter().flat_map(|scale| scale.to_le_bytes()).collect();
        tensors.push((format!("{name}_scale_inv"), Dtype::F32, vec![rows.div_ceil(TILE), across], scale_bytes));
        tensors.push((name.to_owned(), Dtype::F8_E4M3, shape, codes));
    }
    let views = tensors
        .iter()
        .map(|(name, dtype, shape, data)| (name.as_str(), TensorView::new(*dtype, shape.clone(), data).unwrap()));
    fs::write(target.join("model.safetensors"), safetensors::tensor::serialize(views, None).unwrap()).unwrap();
}

/// The code of the F8_E4M3 number nearest to `value`, which is no larger than the largest. Positive codes are in the
/// order of their numbers.
fn nearest_float8(value: f32) -> u8 {
    let number = |code: u8| {
        let mantissa = f32::from(code & 7) / 8.0;
        match code >> 3 {
            0 => mantissa * 2.0f32.powi(-6),
            exponent => (1.0 + mantissa) * 2.0f32.powi(i32::from(exponent) - 7),
        }
    };
    let above = (0..0x7e).find(|&code| number(code) >= value.abs()).unwrap_or(0x7e);
    let below = above.saturating_sub(1);
    let nearest = if value.abs() - number(below) < number(above) - value.abs() { below } else { above };
    if value < 0.0 { nearest | 0x80 } else { nearest }
}
