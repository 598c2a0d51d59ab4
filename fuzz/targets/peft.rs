//! A PEFT folder whose `adapter_config.json` is the input, beside sound factors.
#![no_main]

mod scratch;

use std::sync::Once;

use kintsugi_checkpoint::read_adapter;
use libfuzzer_sys::fuzz_target;

static FACTORS: Once = Once::new();

fuzz_target!(|bytes: &[u8]| {
    FACTORS.call_once(|| {
        let header = br#"{"base_model.model.up.lora_A.weight":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]},"base_model.model.up.lora_B.weight":{"dtype":"F32","shape":[2,1],"data_offsets":[8,16]}}"#;
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend_from_slice(header);
        file.extend([0u8; 16]);
        scratch::put("adapter_model.safetensors", &file);
    });
    let folder = scratch::put("adapter_config.json", bytes);
    let _ = read_adapter(&folder);
});
