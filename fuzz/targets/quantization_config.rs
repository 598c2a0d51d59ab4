//! A `quantization_config` of any method: understood, asked about Linears, and written again.
#![no_main]

use kintsugi_checkpoint::QuantizationConfig;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(value) = serde_json::from_slice(bytes) else { return };
    let Ok(config) = QuantizationConfig::from_json(&value) else { return };
    let _ = config.scheme_of("model.layers.0.self_attn.q_proj");
    if let Ok(written) = config.to_json() {
        let again = QuantizationConfig::from_json(&written).expect("what is written is read");
        assert_eq!(again.scheme(), config.scheme());
    }
});
