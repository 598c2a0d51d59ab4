//! The ledger of an interrupted job.
#![no_main]

mod scratch;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let folder = scratch::put("ledger.jsonl", bytes);
    kintsugi_pipeline::fuzzing::read_ledger(&folder);
});
