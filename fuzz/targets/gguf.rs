//! A GGUF file: opened as a checkpoint, its tensors and its vocabulary read.
#![no_main]

mod scratch;

use kintsugi_checkpoint::Checkpoint;
use kintsugi_checkpoint::gguf::GgufFile;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let path = scratch::put("model.gguf", bytes).join("model.gguf");
    let _ = GgufFile::open(&path);
    let Ok(checkpoint) = Checkpoint::open(&path) else { return };
    let names: Vec<String> = checkpoint.tensors().map(|tensor| tensor.name.clone()).collect();
    for name in names {
        let _ = checkpoint.vector(&name);
        if let Some(linear) = name.strip_suffix(".weight") {
            let _ = checkpoint.linear(linear);
        }
    }
    let _ = checkpoint.tokenizer_json();
    let _ = checkpoint.chat_template();
});
