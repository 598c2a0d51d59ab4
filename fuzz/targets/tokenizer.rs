//! A `tokenizer.json`: read, and used on a text. The reader is compiled by itself: the model around it brings candle,
//! which takes longer to build with a sanitizer than this target to run.
#![no_main]
#![allow(dead_code, unreachable_pub, reason = "the target uses a part of the reader")]

#[path = "../../crates/model/src/contained.rs"]
mod contained;
#[path = "../../crates/model/src/tokenizer.rs"]
mod tokenizer;
#[path = "../../crates/model/src/tokenizer_document.rs"]
mod tokenizer_document;

use libfuzzer_sys::fuzz_target;
use tokenizer::Tokenizer;

fuzz_target!(|bytes: &[u8]| {
    let Ok(tokenizer) = Tokenizer::from_json(bytes, "tokenizer.json") else { return };
    if let Ok(ids) = tokenizer.encode("Once upon a time, 日本 — 12 34\n", true) {
        let _ = tokenizer.decode(&ids, false);
    }
});
