//! The ledger of an interrupted job: read, and a writer of checkpoints put where it says that the job was.
#![no_main]

mod scratch;

use std::fs;
use std::path::PathBuf;
use std::sync::LazyLock;

use kintsugi_checkpoint::{Checkpoint, CheckpointWriter, Ledger, RecordedUnit, UnitRecord};
use libfuzzer_sys::fuzz_target;
use serde::{Deserialize, Serialize};

/// What a record of a compression says about files.
#[derive(Serialize, Deserialize)]
struct Unit {
    part: Option<UnitRecord>,
    activations: Option<String>,
    factors: Option<String>,
}

impl RecordedUnit for Unit {
    fn file_names(&self) -> Vec<&str> {
        self.activations.iter().chain(&self.factors).map(String::as_str).collect()
    }

    fn is_sound(&self) -> bool {
        true
    }
}

/// A checkpoint of one tensor, and the output beside which the ledger lies.
static JOB: LazyLock<(Checkpoint, PathBuf)> = LazyLock::new(|| {
    let out = scratch::put("unit-00000.part", &[0; 64]).with_extension("");
    let folder = out.with_extension("source");
    fs::create_dir_all(&folder).expect("a folder for the checkpoint");
    let header = br#"{"up.weight":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}}"#;
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header);
    file.extend([0u8; 8]);
    fs::write(folder.join("model.safetensors"), file).expect("the checkpoint is written");
    fs::write(folder.join("config.json"), b"{}").expect("its config is written");
    (Checkpoint::open(&folder).expect("the checkpoint is sound"), out)
});

fuzz_target!(|bytes: &[u8]| {
    let (source, out) = &*JOB;
    scratch::put("ledger.jsonl", bytes);
    // The first line of the input is what the job is taken to be.
    let first = bytes.split(|&byte| byte == b'\n').next().unwrap_or_default();
    let identity = serde_json::from_slice(first).unwrap_or_default();
    let Ok(Some((_, units))) = Ledger::reopen::<Unit>(out, &identity) else { return };
    let records: Vec<UnitRecord> = units.into_iter().filter_map(|unit| unit.part).collect();
    if let Ok(Some(mut writer)) = CheckpointWriter::resume(out, source, &records) {
        writer.keep();
    }
});
