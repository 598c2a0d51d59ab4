//! Llama checkpoints of any shape with random weights, written without ever being in memory.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;

use serde_json::{Map, json};

/// Sizes of a Llama model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LlamaShapes {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the MLP.
    pub intermediate: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Tokens.
    pub vocabulary: usize,
    /// Decoder blocks.
    pub blocks: usize,
}

impl LlamaShapes {
    /// Llama-3-8B.
    pub const LLAMA_8B: LlamaShapes =
        LlamaShapes { hidden: 4096, intermediate: 14336, heads: 32, kv_heads: 8, vocabulary: 128_256, blocks: 32 };
    /// Llama-3-70B.
    pub const LLAMA_70B: LlamaShapes =
        LlamaShapes { hidden: 8192, intermediate: 28672, heads: 64, kv_heads: 8, vocabulary: 128_256, blocks: 80 };

    /// The same with fewer blocks.
    #[must_use]
    pub const fn with_blocks(self, blocks: usize) -> Self {
        LlamaShapes { blocks, ..self }
    }

    /// Names and sizes of all tensors, in the order of the file.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let head_dim = self.hidden / self.heads;
        let (query, kv) = (self.heads * head_dim, self.kv_heads * head_dim);
        let mut tensors = vec![
            ("lm_head.weight".to_owned(), vec![self.vocabulary, self.hidden]),
            ("model.embed_tokens.weight".to_owned(), vec![self.vocabulary, self.hidden]),
        ];
        for block in 0..self.blocks {
            let linears = [
                ("mlp.down_proj", self.hidden, self.intermediate),
                ("mlp.gate_proj", self.intermediate, self.hidden),
                ("mlp.up_proj", self.intermediate, self.hidden),
                ("self_attn.k_proj", kv, self.hidden),
                ("self_attn.o_proj", self.hidden, query),
                ("self_attn.q_proj", query, self.hidden),
                ("self_attn.v_proj", kv, self.hidden),
            ];
            let name = |name: &str| format!("model.layers.{block}.{name}.weight");
            tensors.extend(linears.map(|(linear, rows, columns)| (name(linear), vec![rows, columns])));
            tensors.extend(["input_layernorm", "post_attention_layernorm"].map(|norm| (name(norm), vec![self.hidden])));
        }
        tensors.push(("model.norm.weight".to_owned(), vec![self.hidden]));
        tensors
    }
}

/// Writes a bf16 checkpoint into `folder`. Weights are random, `2⁻⁷ … 2⁻⁶` in magnitude, norms are one. With `sparse`
/// the file has its length and no content: its headers can be read, and it takes no space.
///
/// `tokenizer` is copied; it may know fewer tokens than the model has.
///
/// # Panics
/// When a file cannot be written.
pub fn write_llama(folder: &Path, shapes: LlamaShapes, tokenizer: &Path, sparse: bool) {
    fs::create_dir_all(folder).unwrap();
    let config = json!({
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": shapes.hidden,
        "intermediate_size": shapes.intermediate,
        "max_position_embeddings": 8192,
        "model_type": "llama",
        "num_attention_heads": shapes.heads,
        "num_hidden_layers": shapes.blocks,
        "num_key_value_heads": shapes.kv_heads,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": false,
        "vocab_size": shapes.vocabulary,
    });
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    fs::copy(tokenizer, folder.join("tokenizer.json")).unwrap();

    let tensors = shapes.tensors();
    let mut header = Map::new();
    let mut end = 0;
    for (name, shape) in &tensors {
        let start = end;
        end += shape.iter().product::<usize>() * 2;
        header.insert(name.clone(), json!({ "dtype": "BF16", "shape": shape, "data_offsets": [start, end] }));
    }
    let mut header = serde_json::to_vec(&header).unwrap();
    header.resize(header.len().next_multiple_of(8), b' ');
    let file = File::create(folder.join("model.safetensors")).unwrap();
    let mut output = BufWriter::with_capacity(1 << 22, &file);
    output.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    output.write_all(&header).unwrap();
    if sparse {
        output.flush().unwrap();
        file.set_len((8 + header.len() + end) as u64).unwrap();
        return;
    }
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    for (_, shape) in &tensors {
        let count: usize = shape.iter().product();
        if shape.len() == 1 {
            output.write_all(&0x3f80u16.to_le_bytes().repeat(count)).unwrap();
            continue;
        }
        // Sign and mantissa of four values at a time; the exponent is that of 2⁻⁷.
        for values in 0..count.div_ceil(4) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let bytes = (state & 0x807f_807f_807f_807f | 0x3c00_3c00_3c00_3c00).to_le_bytes();
            output.write_all(&bytes[..2 * (count - 4 * values).min(4)]).unwrap();
        }
    }
    output.flush().unwrap();
}
