//! A `tokenizer.json`: read, and used on a text.
#![no_main]

use kintsugi_model::Tokenizer;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(tokenizer) = Tokenizer::from_json(bytes, "tokenizer.json") else { return };
    if let Ok(ids) = tokenizer.encode("Once upon a time, 日本 — 12 34\n", true) {
        let _ = tokenizer.decode(&ids, false);
    }
});
