//! A checkpoint rewritten without changing its function so that it has the activation outliers of large models.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use half::bf16;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::Deserialize;

/// Channels of one block that are multiplied, with their factors (powers of two, so that bf16 stays exact).
#[derive(Debug, Deserialize)]
struct OutlierChannels {
    /// Outputs of the norm before the attention.
    attention_norm: Vec<(usize, f32)>,
    /// Outputs of the norm before the MLP.
    mlp_norm: Vec<(usize, f32)>,
    /// Outputs of the up projection.
    up: Vec<(usize, f32)>,
    /// Outputs of the value projection.
    value: Vec<(usize, f32)>,
}

/// A bf16 tensor that is being rewritten.
struct Tensor {
    shape: Vec<usize>,
    values: Vec<bf16>,
}

impl Tensor {
    fn scale_row(&mut self, row: usize, factor: f32) {
        let width = self.values.len() / self.shape[0];
        for value in &mut self.values[row * width..(row + 1) * width] {
            *value = bf16::from_f32(value.to_f32() * factor);
        }
    }

    fn scale_column(&mut self, column: usize, factor: f32) {
        let width = self.shape[1];
        for value in self.values.iter_mut().skip(column).step_by(width) {
            *value = bf16::from_f32(value.to_f32() * factor);
        }
    }
}

/// Copies the Llama checkpoint `source` (one bf16 safetensors file) to `target`, multiplying the channels that the
/// JSON file `channels` lists per block and dividing the columns of the Linears that read them.
///
/// `heads_per_kv_head` query heads share each value head of width `head_dim`.
///
/// # Panics
/// When a file cannot be read, is not such a checkpoint, or cannot be written.
pub fn write_outlier_checkpoint(
    source: &Path,
    channels: &Path,
    target: &Path,
    head_dim: usize,
    heads_per_kv_head: usize,
) {
    fs::create_dir_all(target).unwrap();
    for entry in fs::read_dir(source).unwrap() {
        let entry = entry.unwrap();
        if entry.path().extension().is_some_and(|extension| extension == "json") {
            fs::copy(entry.path(), target.join(entry.file_name())).unwrap();
        }
    }
    let bytes = fs::read(source.join("model.safetensors")).unwrap();
    let mut tensors: BTreeMap<String, Tensor> = SafeTensors::deserialize(&bytes)
        .unwrap()
        .iter()
        .map(|(name, view)| {
            assert_eq!(view.dtype(), Dtype::BF16, "{name}");
            let values = view.data().chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]])).collect();
            (name.to_owned(), Tensor { shape: view.shape().to_vec(), values })
        })
        .collect();

    let blocks: Vec<OutlierChannels> = serde_json::from_slice(&fs::read(channels).unwrap()).unwrap();
    for (index, block) in blocks.iter().enumerate() {
        let mut tensor = |name: &str, change: &mut dyn FnMut(&mut Tensor)| {
            change(tensors.get_mut(&format!("model.layers.{index}.{name}.weight")).unwrap());
        };
        for (norm, readers, list) in [
            (
                "input_layernorm",
                ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"].as_slice(),
                &block.attention_norm,
            ),
            ("post_attention_layernorm", ["mlp.gate_proj", "mlp.up_proj"].as_slice(), &block.mlp_norm),
        ] {
            for &(channel, factor) in list {
                tensor(norm, &mut |t| t.scale_row(channel, factor));
                for reader in readers {
                    tensor(reader, &mut |t| t.scale_column(channel, 1.0 / factor));
                }
            }
        }
        for &(channel, factor) in &block.up {
            tensor("mlp.up_proj", &mut |t| t.scale_row(channel, factor));
            tensor("mlp.down_proj", &mut |t| t.scale_column(channel, 1.0 / factor));
        }
        for &(channel, factor) in &block.value {
            tensor("self_attn.v_proj", &mut |t| t.scale_row(channel, factor));
            let (kv_head, offset) = (channel / head_dim, channel % head_dim);
            for head in kv_head * heads_per_kv_head..(kv_head + 1) * heads_per_kv_head {
                tensor("self_attn.o_proj", &mut |t| t.scale_column(head * head_dim + offset, 1.0 / factor));
            }
        }
    }

    let raw: Vec<(String, Vec<usize>, Vec<u8>)> = tensors
        .into_iter()
        .map(|(name, t)| (name, t.shape, t.values.iter().flat_map(|v| v.to_le_bytes()).collect()))
        .collect();
    let views = raw
        .iter()
        .map(|(name, shape, data)| (name.as_str(), TensorView::new(Dtype::BF16, shape.clone(), data).unwrap()));
    let file = safetensors::tensor::serialize(views, None).unwrap();
    fs::write(target.join("model.safetensors"), file).unwrap();
}
