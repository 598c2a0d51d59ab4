//! A checkpoint whose `model.safetensors` is the input: opened, and every tensor read in every way.
#![no_main]

mod scratch;

use std::sync::Once;

use kintsugi_checkpoint::Checkpoint;
use libfuzzer_sys::fuzz_target;

static CONFIG: Once = Once::new();

fuzz_target!(|bytes: &[u8]| {
    CONFIG.call_once(|| {
        let config = br#"{ "quantization_config": { "quant_method": "compressed-tensors", "format": "pack-quantized",
            "config_groups": { "group_0": { "targets": ["Linear"], "weights": { "num_bits": 4, "group_size": 2 } } } } }"#;
        scratch::put("config.json", config);
    });
    let folder = scratch::put("model.safetensors", bytes);
    let Ok(checkpoint) = Checkpoint::open(&folder) else { return };
    let names: Vec<String> = checkpoint.tensors().map(|tensor| tensor.name.clone()).collect();
    for name in names {
        let _ = checkpoint.dense(&name);
        let _ = checkpoint.vector(&name);
        if let Some((linear, _)) = name.rsplit_once('.') {
            let _ = checkpoint.linear(linear);
            let _ = checkpoint.linear_shape(linear);
        }
    }
});
