//! Damaged adapter folders: 200 random corruptions, each refused with nothing written.
//!
//! A corruption is one that a reader can know of. A bit that turns one finite number of a safetensors file into another
//! leaves a valid adapter, and so do bytes that the formats do not look at: blanks in a header, dates in an archive. What
//! is changed here is structure, numbers that stop being finite, and anything below a checksum.

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::merges::{recipe, run, vectors};
use kintsugi_runtime::ErrorCode;
use kintsugi_testkit::Random;
use serde_json::{Value, json};

const SAFETENSORS: &str = "adapter_model.safetensors";
const TORCH: &str = "adapter_model.bin";
const CONFIG: &str = "adapter_config.json";

/// What is wrong with a folder, in words.
type Corruption = fn(&Path, &mut Random) -> String;

#[test]
fn two_hundred_corruptions_are_each_refused_with_nothing_written() {
    let kinds: [(&str, Corruption); 13] = [
        ("first", file_is_missing),
        ("first", file_is_cut_off),
        ("binary", file_is_cut_off),
        ("first", bytes_follow_the_end),
        ("first", piece_of_the_header_is_missing),
        ("first", header_length_is_wrong),
        ("first", name_or_number_in_the_header_is_changed),
        ("first", value_is_not_finite),
        ("first", tensor_is_renamed),
        ("binary", byte_below_a_checksum_is_changed),
        ("first", config_lacks_or_turns_a_field),
        ("first", config_names_another_kind_of_adapter),
        ("first", config_and_weights_disagree),
    ];
    let mut random = Random::new(2026);
    let out = tempfile::tempdir().unwrap();
    for case in 0..16 * kinds.len() {
        let (source, corrupt) = kinds[case % kinds.len()];
        let folder = tempfile::tempdir().unwrap();
        for entry in fs::read_dir(vectors().join(source)).unwrap() {
            let path = entry.unwrap().path();
            fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
        }
        let what = corrupt(folder.path(), &mut random);
        let sources = [folder.path().to_path_buf(), vectors().join("second")];
        let method = ["svd", "cat", "lego", "ties"][random.below(4)];
        let mut recipe = recipe(&sources, &[1.0, 0.5], method, &out.path().join("out"));
        recipe.options.report = random.below(2) == 0;
        match run(&recipe) {
            Err(error) => {
                assert!(!error.subject.is_empty() && !error.hint.is_empty(), "{what}: {error}");
                assert_ne!(error.code, ErrorCode::Internal, "{what}: {error}");
            }
            Ok(_) => panic!("case {case} with {method} was merged: {what}"),
        }
        assert_eq!(fs::read_dir(out.path()).unwrap().count(), 0, "{what}: something was written");
    }
}

fn weights_of(folder: &Path) -> PathBuf {
    let safetensors = folder.join(SAFETENSORS);
    if safetensors.exists() { safetensors } else { folder.join(TORCH) }
}

/// Changes the bytes of a file.
fn change(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(path).unwrap();
    change(&mut bytes);
    fs::write(path, bytes).unwrap();
}

/// Where the header of a safetensors file lies, its padding aside.
fn header(bytes: &[u8]) -> Range<usize> {
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let padding = bytes[8..8 + length].iter().rev().take_while(|&&byte| byte == b' ').count();
    8..8 + length - padding
}

fn file_is_missing(folder: &Path, random: &mut Random) -> String {
    let file = [SAFETENSORS, CONFIG][random.below(2)];
    fs::remove_file(folder.join(file)).unwrap();
    format!("no {file}")
}

fn file_is_cut_off(folder: &Path, random: &mut Random) -> String {
    let path = if random.below(4) == 0 { folder.join(CONFIG) } else { weights_of(folder) };
    let mut left = 0;
    change(&path, |bytes| {
        // The last byte of a JSON file is a line end at most.
        left = random.below(bytes.len() - 2);
        bytes.truncate(left);
    });
    format!("{} cut off at {left}", path.display())
}

fn bytes_follow_the_end(folder: &Path, random: &mut Random) -> String {
    let count = 1 + random.below(64);
    change(&folder.join(SAFETENSORS), |bytes| bytes.extend((0..count).map(|_| random.bits() as u8)));
    format!("{count} bytes too many")
}

fn piece_of_the_header_is_missing(folder: &Path, random: &mut Random) -> String {
    let mut piece = 0..0;
    change(&folder.join(SAFETENSORS), |bytes| {
        let header = header(bytes);
        let start = header.start + random.below(header.len());
        piece = start..(start + 1 + random.below(40)).min(header.end);
        bytes.drain(piece.clone());
    });
    format!("no bytes {piece:?}")
}

fn header_length_is_wrong(folder: &Path, random: &mut Random) -> String {
    let mut claimed = 0;
    change(&folder.join(SAFETENSORS), |bytes| {
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap());
        claimed = match random.below(3) {
            0 => random.bits(),
            1 => random.below(length as usize) as u64,
            _ => length + 1 + random.below(200) as u64,
        };
        bytes[..8].copy_from_slice(&claimed.to_le_bytes());
    });
    format!("a header of {claimed} bytes")
}

/// Any byte of the header that is no blank and not in the strings of `__metadata__`.
fn name_or_number_in_the_header_is_changed(folder: &Path, random: &mut Random) -> String {
    let mut what = String::new();
    change(&folder.join(SAFETENSORS), |bytes| {
        let header = header(bytes);
        let text = String::from_utf8(bytes[header.clone()].to_vec()).unwrap();
        let metadata = text.find("\"__metadata__\"").map_or(0..0, |at| at..at + text[at..].find('}').unwrap() + 1);
        let at = loop {
            let at = random.below(header.len());
            if !metadata.contains(&at) && bytes[header.start + at] != b' ' {
                break at;
            }
        };
        let before = bytes[header.start + at];
        let after = loop {
            let byte = 33 + random.below(94) as u8;
            // Another letter case, or a number that means the same, is no damage.
            if byte != before {
                break byte;
            }
        };
        bytes[header.start + at] = after;
        what = format!("'{}' for '{}' at {at}", char::from(after), char::from(before));
    });
    what
}

fn value_is_not_finite(folder: &Path, random: &mut Random) -> String {
    let value = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][random.below(3)];
    let mut at = 0;
    change(&folder.join(SAFETENSORS), |bytes| {
        let start = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        at = start + 4 * random.below((bytes.len() - start) / 4);
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    });
    format!("{value} at {at}")
}

/// One of a pair of factors under another name of the same length.
fn tensor_is_renamed(folder: &Path, random: &mut Random) -> String {
    let [from, to] = [["lora_A", "lora_B"], ["lora_B", "lora_A"], ["lora_A", "lora_C"]][random.below(3)];
    change(&folder.join(SAFETENSORS), |bytes| {
        let header = header(bytes);
        let text = String::from_utf8(bytes[header.clone()].to_vec()).unwrap();
        let places: Vec<usize> = text.match_indices(from).map(|(at, _)| at).collect();
        let at = header.start + places[random.below(places.len())];
        bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
    });
    format!("{to} for {from}")
}

/// Any byte of the tensors, or of the pickle that describes them.
fn byte_below_a_checksum_is_changed(folder: &Path, random: &mut Random) -> String {
    let mut at = 0;
    change(&folder.join(TORCH), |bytes| {
        let entries = stored_entries(bytes);
        let entry = &entries[random.below(entries.len())];
        at = entry.start + random.below(entry.len());
        bytes[at] ^= 1 << random.below(8);
    });
    format!("a bit at {at}")
}

/// The contents of the pickle and of the storages in an archive, by the local headers.
fn stored_entries(bytes: &[u8]) -> Vec<Range<usize>> {
    let u16_at = |at: usize| usize::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]));
    let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
    // The directory knows sizes that torch leaves out of the local headers.
    let end = (0..bytes.len() - 21).rev().find(|&at| bytes[at..at + 4] == *b"PK\x05\x06").unwrap();
    let (count, mut at) = (u16_at(end + 10), u32_at(end + 16));
    let mut entries = Vec::new();
    for _ in 0..count {
        let (size, name, extra, comment) = (u32_at(at + 24), u16_at(at + 28), u16_at(at + 30), u16_at(at + 32));
        let local = u32_at(at + 42);
        let name_text = String::from_utf8_lossy(&bytes[at + 46..at + 46 + name]).into_owned();
        if size > 0 && (name_text.ends_with("data.pkl") || name_text.contains("/data/")) {
            let start = local + 30 + u16_at(local + 26) + u16_at(local + 28);
            entries.push(start..start + size);
        }
        at += 46 + name + extra + comment;
    }
    assert!(entries.len() > 2);
    entries
}

fn change_config(folder: &Path, change: impl FnOnce(&mut serde_json::Map<String, Value>)) {
    let path = folder.join(CONFIG);
    let mut config = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut config);
    fs::write(&path, serde_json::to_vec(&config).unwrap()).unwrap();
}

fn config_lacks_or_turns_a_field(folder: &Path, random: &mut Random) -> String {
    let field = ["peft_type", "r", "lora_alpha"][random.below(3)];
    let value = [None, Some(json!(null)), Some(json!("x")), Some(json!([4])), Some(json!({}))][random.below(5)].clone();
    let what = format!("{field} is {value:?}");
    change_config(folder, |config| {
        config.remove(field);
        config.extend(value.map(|value| (field.to_string(), value)));
    });
    what
}

fn config_names_another_kind_of_adapter(folder: &Path, random: &mut Random) -> String {
    let fields = [
        ("use_dora", json!(true)),
        ("lora_bias", json!(true)),
        ("bias", json!("all")),
        ("target_parameters", json!(["experts.gate"])),
        ("peft_type", json!("IA3")),
        ("init_lora_weights", json!("pissa_niter_4")),
        ("modules_to_save", json!(["lm_head"])),
        ("rank_pattern", json!({ "(q|v)_proj": 8 })),
        ("trainable_token_indices", json!([1, 2])),
        ("layer_replication", json!([[0, 2]])),
    ];
    let (field, value) = fields[random.below(fields.len())].clone();
    let what = format!("{field} is {value}");
    change_config(folder, |config| drop(config.insert(field.to_string(), value)));
    what
}

fn config_and_weights_disagree(folder: &Path, random: &mut Random) -> String {
    let rank = loop {
        let rank = 1 + random.below(99);
        if rank != 4 {
            break rank;
        }
    };
    let pattern = random.below(2) == 0;
    change_config(folder, |config| {
        match pattern {
            true => config.insert("rank_pattern".into(), json!({ "q_proj": rank })),
            false => config.insert("r".into(), json!(rank)),
        };
    });
    format!("rank {rank}, as a pattern: {pattern}")
}
